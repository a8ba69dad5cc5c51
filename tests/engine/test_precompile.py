"""What is compiled ahead is what a bfloat16 model meets; children leave it on disk, and do no harm when they fail."""

import sys
from pathlib import Path
from types import ModuleType

import numba
import pytest

from adapters.ops import cpu_affine_kernels as affine
from adapters.ops import cpu_kernels as lora
from adapters.ops import cpu_product_kernels as row_products
from adapters.ops.chunk_kernel import ChunkKernel, chunk_kernel
from server.engine import fused_kernels, fused_mlp_kernels, precompile, product_kernels
from server.engine.attention import cpu_kernels as attention
from server.engine.attention import prefill_kernels
from server.engine.precompile import SECONDS, compile_at_once, compile_missing, kernel_named, shares

LATER = {"attend_bf16"}  # for heads of other sizes than nearly all models have
SMALL = ("server.engine.fused_kernels:_add_bf16", "server.engine.fused_mlp_kernels:silu_times")


@pytest.mark.parametrize(
    "module",
    [lora, affine, row_products, attention, prefill_kernels, product_kernels, fused_mlp_kernels, fused_kernels],
    ids=str,
)
def test_every_bfloat16_kernel_is_compiled_ahead(module: ModuleType) -> None:
    kernels = {name: each for name, each in vars(module).items() if isinstance(each, ChunkKernel)}
    assert kernels
    ahead = [kernel_named(name) for name in SECONDS]
    for name, kernel in kernels.items():
        assert (kernel in ahead) == (not name.endswith("_f32") and name not in LATER), name


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_processes_share_all_kernels_evenly(num_processes: int) -> None:
    found = shares(SECONDS, num_processes)
    assert len(found) == num_processes and sorted(sum(found, [])) == sorted(SECONDS)
    busy = [sum(map(SECONDS.__getitem__, names)) for names in found]
    busy[1:] = [seconds + precompile._CHILD_DELAY for seconds in busy[1:]]
    assert max(busy) - min(busy) < max(SECONDS.values()) / 2


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """numba's folder on disk, here and in children, with nothing in it."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(precompile, "SECONDS", dict.fromkeys(SMALL, 1.0))
    return tmp_path


@pytest.fixture
def compiled_here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of kernels that this process wants the addresses of, and does not get: it may have them."""

    class Wanted:
        def __init__(self, name: str) -> None:
            self._name = name

        @property
        def is_missing_on_disk(self) -> bool:
            return kernel_named(self._name).is_missing_on_disk

        @property
        def address(self) -> int:
            names.append(self._name)
            return 1

    names: list[str] = []
    monkeypatch.setattr(precompile, "kernel_named", Wanted)
    return names


def test_a_child_leaves_its_share_on_disk(
    empty_cache: Path,
    compiled_here: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    assert all(kernel_named(name).is_missing_on_disk for name in SMALL)
    monkeypatch.setattr(precompile, "_CHILD_DELAY", 0.0)
    compile_missing(2)
    assert compiled_here == [SMALL[0]]
    assert [kernel_named(name).is_missing_on_disk for name in SMALL] == [True, False]
    assert "Compiling 2 CPU kernels for the first start" in caplog.text
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("program", ["/nowhere/python", "/bin/false"])
def test_without_children_a_start_goes_on(
    program: str,
    empty_cache: Path,
    compiled_here: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(sys, "executable", program)
    monkeypatch.setattr(precompile, "_CHILD_DELAY", 0.0)
    compile_at_once(SMALL, 2)
    assert compiled_here == [SMALL[0]] and kernel_named(SMALL[1]).is_missing_on_disk
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_child_that_does_not_end_is_ended(
    tmp_path: Path, compiled_here: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sleeper = tmp_path / "python"
    sleeper.write_text("#!/bin/sh\nexec sleep 600\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(sleeper))
    monkeypatch.setattr(precompile, "_CHILD_DELAY", 0.0)
    monkeypatch.setattr(precompile, "_PATIENCE", 0.1)
    compile_at_once(SMALL, 2)
    assert "does not end" in caplog.text


def test_nothing_is_compiled_ahead_that_no_disk_would_keep(
    compiled_here: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(function: object) -> None:
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr("adapters.ops.chunk_kernel.FunctionCache", refuse)
    caplog.set_level("INFO")
    compile_missing(2)
    assert compiled_here == [] and caplog.text == ""


def test_a_kernel_knows_whether_the_disk_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    kernel = chunk_kernel()(_nothing)
    assert kernel.is_missing_on_disk
    assert kernel.address and not kernel.is_missing_on_disk


def _nothing(arguments, chunk):  # type: ignore[no-untyped-def]
    pass
