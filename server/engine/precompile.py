"""Compiles the CPU kernels of a bfloat16 model in a few processes at once: `python -m server.engine.precompile`.

numba compiles under the interpreter's lock, so threads would gain nothing. Each process compiles a share and leaves it
in numba's cache on disk, where the others find it. The command does so before any server starts; a server that misses
kernels does it at its first start. A process that fails costs time only: what it leaves out is compiled when it is
wanted. Knows the kernels by name and imports them only when it compiles them: a child is to import little.
"""

import importlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from adapters.ops import bf16_dot
from adapters.ops.chunk_kernel import ChunkKernel
from adapters.ops.thread_team import ThreadTeam

logger = logging.getLogger(__name__)

SECONDS = {
    "server.engine.attention.cpu_kernels:attend_by_dots": 6.0,
    "adapters.ops.cpu_kernels:add_tile_bf16": 6.3,
    "adapters.ops.cpu_kernels:add_bf16": 3.3,
    "server.engine.attention.prefill_kernels:attend_pieces": 2.8,
    "adapters.ops.cpu_affine_kernels:affine_bf16": 1.5,
    "server.engine.product_kernels:product": 1.2,
    "adapters.ops.cpu_product_kernels:multiply_rows_bf16": 0.7,
    "server.engine.fused_kernels:_rms_norm_bf16": 0.7,
    "server.engine.fused_kernels:_rotary_bf16": 0.7,
    "server.engine.attention.cpu_kernels:write_bf16": 0.4,
    "server.engine.fused_mlp_kernels:silu_times": 0.2,
    "adapters.ops.row_writer:copy_piece": 0.1,
    "server.engine.fused_kernels:_add_bf16": 0.2,
}
"""module:name of the kernels that a stock Llama-like model meets, and about how long each takes to compile; others wait
for a model that does."""

_COMPILED_ON_IMPORT = ("adapters.ops.page_toucher", "server.engine.row_maximum")
_CHILD_DELAY = 4.0  # seconds that a child is behind: its imports, and what numba sets up for a first kernel
_MAX_PROCESSES = 3  # with more the longest kernel alone would set the time; each takes 400 MB
_PATIENCE = 120.0  # seconds that a child may take longer than its parent
_ROOT = Path(__file__).parents[2]


def kernel_named(name: str) -> ChunkKernel:
    module, _, attribute = name.partition(":")
    kernel: ChunkKernel = getattr(importlib.import_module(module), attribute)
    return kernel


def compile_missing(num_processes: int) -> None:
    """Compile what the disk lacks and would keep; nothing where it keeps nothing, or for a process alone."""
    missing = [name for name in SECONDS if kernel_named(name).is_missing_on_disk]
    if len(missing) < 2 or num_processes < 2:
        return
    logger.info("Compiling %d CPU kernels for the first start; they are kept on disk", len(missing))
    began = time.monotonic()
    compile_at_once(missing, num_processes)
    logger.info("Compiled the CPU kernels in %.0f s", time.monotonic() - began)


def compile_at_once(names: Iterable[str], num_processes: int) -> None:
    """Compile a share here and the others in children."""
    own, *others = shares(names, min(num_processes, _MAX_PROCESSES))
    with _children(others):
        for name in own:
            assert kernel_named(name).address


def shares(names: Iterable[str], num_processes: int) -> list[list[str]]:
    """The names for each process, this one first, so that all end at about the same time: longest first, each to whom
    has least to do."""
    seconds = [0.0] + [_CHILD_DELAY] * (num_processes - 1)
    found: list[list[str]] = [[] for _ in seconds]
    for name in sorted(names, key=SECONDS.__getitem__, reverse=True):
        least = seconds.index(min(seconds))
        seconds[least] += SECONDS[name]
        found[least].append(name)
    return found


@contextmanager
def _children(shares: Sequence[Sequence[str]]) -> Iterator[None]:
    """A process for each share that is not empty, waited for at the end; one that fails is told of and does no harm."""
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    children: list[subprocess.Popen[bytes]] = []
    try:
        for names in filter(None, shares):
            command = [sys.executable, "-m", "server.engine.precompile", *names]
            # In a session of its own: a signal from the keyboard is this process's to handle.
            children.append(
                subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": path}, start_new_session=True
                )
            )
    except OSError as error:
        logger.warning("no process to compile kernels in (%s): it will take longer", error)
    try:
        yield
        _wait(children)
    finally:
        for child in children:
            child.kill()
            child.wait()


def _wait(children: Sequence[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + _PATIENCE
    for child in children:
        try:
            status = child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            logger.warning("a process that compiles kernels does not end: what it lacks is compiled when it is wanted")
            continue
        if status != 0:
            logger.warning("a process that compiles kernels ended with %d: what it lacks is compiled later", status)


def main(names: Sequence[str]) -> None:
    """Compile the kernels named; without names all, in children too."""
    if names:
        for name in names:
            assert kernel_named(name).address
        return
    if not bf16_dot.is_supported():
        return  # torch computes most of it
    began = time.monotonic()
    compile_at_once(SECONDS, len(os.sched_getaffinity(0)))
    ThreadTeam(2).close()
    for module in _COMPILED_ON_IMPORT:
        importlib.import_module(module)
    if (seconds := time.monotonic() - began) > 5:  # children take some seconds to find that nothing is missing
        print(f"Compiled the CPU kernels in {seconds:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
