"""`python -m loadtest kernels`: its arguments. Times the CPU operations against their floors, in this process.

What measures is imported only when it is asked for: it brings torch and numba, which no other command needs.
"""

import argparse
import importlib
from dataclasses import dataclass
from pathlib import Path

HELP = "every CPU operation against its byte and flop floor, in this process"

_MEASURING = "loadtest.kernels_run"
PAGE = Path("docs/benchmarks/cpu-kernels.md")


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSettings:
    threads: int | None = None  # None: as many as the engine takes
    rounds: int = 30  # readings of each operation, in turns with the ceilings
    check: bool = True  # exit 1 where a LoRA operation is over its limit
    quick: bool = False  # data that fit in the cache, two rounds, no check: does it run?
    results: Path = Path("bench-results")
    publish: Path | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = KernelSettings()
    parser.add_argument("--threads", type=int, help="threads of the kernels; as many as the engine takes if unset")
    parser.add_argument("--rounds", type=int, default=defaults.rounds, help="readings of each operation")
    parser.add_argument("--no-check", dest="check", action="store_false", help="measure only, whatever the ratios")
    parser.add_argument("--quick", action="store_true", help="tiny data, two rounds, no check: does it run?")
    parser.add_argument("--results", type=Path, default=defaults.results)
    parser.add_argument("--publish", type=Path, help=f"also write the page here, such as {PAGE}")


def main(arguments: argparse.Namespace) -> int:
    """Raises ValueError for numbers that cannot be measured with."""
    settings = KernelSettings(**{name: value for name, value in vars(arguments).items() if name != "command"})
    if settings.rounds < 1:
        raise ValueError(f"--rounds is {settings.rounds}; it must be at least 1")
    if settings.threads is not None and settings.threads < 1:
        raise ValueError(f"--threads is {settings.threads}; it must be at least 1")
    status: int = importlib.import_module(_MEASURING).measure(settings)
    return status
