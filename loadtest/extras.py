"""`python -m loadtest extras`: its arguments. Times decode steps in which one row has more than low-rank pairs.

What measures is imported only when it is asked for: it brings torch and numba, which no other command needs.
"""

import argparse
import importlib
from dataclasses import dataclass
from pathlib import Path

HELP = "what one row with DoRA, a bias, replaced norms … costs a decode step, in this process"

_MEASURING = "loadtest.extras_run"
PAGE = Path("docs/benchmarks/cpu-extras.md")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtrasSettings:
    model: Path | None = None  # None: the default model
    threads: int | None = None  # None: as many as the engine takes
    rows: int = 32  # of one step, one of which has more
    adapters: int = 8  # plain ones that the rows share
    lora_rank: int = 16
    context: int = 128  # tokens that each row sees
    rounds: int = 60  # pairs of steps of each kind
    check: bool = True  # exit 1 where a kind is over its limit
    results: Path = Path("bench-results")
    publish: Path | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = ExtrasSettings()
    parser.add_argument("--model", type=Path, help="folder of the base; the default model if unset")
    parser.add_argument("--threads", type=int, help="threads of the kernels; as many as the engine takes if unset")
    for name, text in (
        ("rows", "decode rows of a step, one of which has more than low-rank pairs"),
        ("adapters", "plain adapters that the rows share"),
        ("lora-rank", "rank of all adapters"),
        ("context", "tokens that each row sees"),
        ("rounds", "pairs of steps of each kind"),
    ):
        parser.add_argument(f"--{name}", type=int, default=getattr(defaults, name.replace("-", "_")), help=text)
    parser.add_argument("--no-check", dest="check", action="store_false", help="measure only, whatever the ratios")
    parser.add_argument("--results", type=Path, default=defaults.results)
    parser.add_argument("--publish", type=Path, help=f"also write the page here, such as {PAGE}")


def main(arguments: argparse.Namespace) -> int:
    """Raises ValueError for numbers that cannot be measured with."""
    settings = ExtrasSettings(**{name: value for name, value in vars(arguments).items() if name != "command"})
    for name in ("rows", "adapters", "lora_rank", "context", "rounds"):
        if getattr(settings, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(settings, name)}; it must be at least 1")
    if settings.threads is not None and settings.threads < 1:
        raise ValueError(f"--threads is {settings.threads}; it must be at least 1")
    status: int = importlib.import_module(_MEASURING).measure(settings)
    return status
