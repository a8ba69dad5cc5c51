"""What `python -m loadtest gpu` does: each part on the device named, and the report. Knows no figure's meaning."""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from adapters.adapter_ref import AdapterUse
from loadtest.gpu import kernels, report
from loadtest.gpu.serving import measure_serving
from loadtest.gpu.steps import BLOCK_SIZE, StepSettings, measure_model, requests_of
from loadtest.gpu.timing import Ceilings, Device, measure_ceilings
from loadtest.gpu_command import PARTS
from server.engine.engine import Engine
from server.engine.forward_batch import build_forward_batch

MAX_ERROR = 1e-2  # relative, bfloat16
_TESTS = (
    "tests/gpu", "tests/adapters/test_gpu_lora.py", "tests/adapters/test_gpu_affine.py",
    "tests/adapters/test_affine_ops.py", "tests/engine/test_gpu_attention.py",
)  # fmt: skip


def measure(arguments: argparse.Namespace) -> int:
    """The exit status."""
    wanted = arguments.parts or list(PARTS)
    if not set(wanted) <= set(PARTS):
        print(f"FAILED: parts are {', '.join(PARTS)}", file=sys.stderr)
        return 1
    where = torch.device(arguments.device)
    if where.type == "cuda" and not torch.cuda.is_available():
        print("FAILED: there is no CUDA device; --device cpu --tiny tries the script out", file=sys.stderr)
        return 1
    device = Device(where, rounds=1 if arguments.tiny else 5, repeats=1 if arguments.tiny else 20)
    began = time.monotonic()
    found: dict[str, Any] = {"environment": report.environment()}
    failed = _check(found) if "check" in wanted else False
    with torch.inference_mode():
        ceilings = measure_ceilings(device, tiny=arguments.tiny)
        found["copy TB/s"], found["bf16 TFLOP/s"] = ceilings.bytes_per_second / 1e12, ceilings.flops_per_second / 1e12
        if "kernels" in wanted:
            found["kernels"] = kernels.measure_kernels(
                device, ceilings, kernels.TINY if arguments.tiny else kernels.LLAMA_8B
            )
            failed |= any(not row["error"] <= MAX_ERROR for row in found["kernels"])
        if {"steps", "serving", "profile"} & set(wanted):
            _measure_models(device, ceilings, arguments, wanted, found)
    found["seconds"] = time.monotonic() - began
    print(report.write(arguments.out, "-".join(["gpu", *wanted]), found))
    if failed:
        print("FAILED: a test failed or an operation is wrong; see above", file=sys.stderr)
    return int(failed)


def _check(found: dict[str, Any]) -> bool:
    """Without the project's pytest settings: they name plugins that such a machine need not have."""
    bare = ["-q", "-c", os.devnull, "--rootdir", ".", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *bare, *(path for path in _TESTS if Path(path).exists())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found["check"] = done.stdout[-3000:] + done.stderr[-1000:]
    return done.returncode != 0


def _settings(arguments: argparse.Namespace, model: str) -> StepSettings:
    if not arguments.tiny:
        return StepSettings(model=model, lora_rank=arguments.rank, context=arguments.context)
    return StepSettings(
        model="tiny", decode_rows=(2,), num_adapters=(1, 2), context=8, chunk=16, prefill_adapters=(1,), lora_rank=4
    )


def _measure_models(
    device: Device, ceilings: Ceilings, arguments: argparse.Namespace, wanted: list[str], found: dict[str, Any]
) -> None:
    for model in ["tiny"] if arguments.tiny else arguments.models.split(","):
        settings = _settings(arguments, model)
        rows, start, engine = measure_model(device, ceilings, settings)
        found.setdefault("steps", []).extend(rows)
        found.setdefault("start", []).append({"model": model, **start})
        num_rows = max(settings.decode_rows)
        if "profile" in wanted:
            found[f"profile of a decode step, {model}"] = _profile(device, engine, settings, num_rows)
        if "serving" in wanted:
            mixes = tuple(n for n in (0, *settings.num_adapters) if n <= num_rows)
            serving = measure_serving(device, engine, num_rows, mixes)
            found.setdefault("serving", []).extend({"model": model, **row} for row in serving)
        del engine
        if device.is_cuda:
            torch.cuda.empty_cache()


def _profile(device: Device, engine: Engine, settings: StepSettings, num_rows: int) -> str:
    """The twenty kernels that take longest in one decode step of as many adapters as rows."""
    uses = [AdapterUse(version) for version in engine.adapters.active_versions][
        : min(num_rows, settings.num_adapters[-1])
    ]
    rows = requests_of(num_rows, settings.context, 1, uses)
    batch = build_forward_batch(rows, BLOCK_SIZE, engine.adapters.row_ranges)
    engine.runner.execute(batch)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.is_cuda else [])]
    with profile(activities=activities) as recorded:
        engine.runner.execute(batch)
        device.synchronize()
    order = "self_device_time_total" if device.is_cuda else "self_cpu_time_total"
    text: str = recorded.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=60)
    return text
