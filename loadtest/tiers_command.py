"""`python -m loadtest tiers`: its arguments and its table."""

import argparse
import json
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from loadtest.peers_requirements import Requirement
from loadtest.peers_weights import cached_weights
from loadtest.report import describe_machine
from loadtest.tiers import Tiers

HELP = "adapters on disk, in memory and on the device: cold starts, loads beside traffic, more than fit"

CELLS = (
    "cold_start",
    "loads_beside",
    "loads_beside_spare",
    "cold_loads_beside",
    "larger_than_device",
    "many_registered",
    "pool_use",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cells", default=",".join(CELLS), help=f"of {','.join(CELLS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=Path("bench-results"))
    parser.add_argument("--publish", type=Path, help="write the table here too")


def main(arguments: argparse.Namespace) -> int:
    """0 when every figure held, 1 otherwise."""
    cells = arguments.cells.split(",")
    if unknown := sorted(set(cells) - set(CELLS)):
        raise ValueError(f"--cells {', '.join(unknown)}: there are {', '.join(CELLS)}")
    began, measured = datetime.now(UTC), list[Requirement]()
    with tempfile.TemporaryDirectory(prefix="tiers-") as scratch:
        tiers = Tiers(cached_weights(), Path(scratch), arguments.results, arguments.rounds)
        for cell in cells:
            print(f"Measuring {cell}", flush=True)
            measured.append(getattr(tiers, cell)())
            print(_row(measured[-1]), flush=True)
    page = _page(measured, began, arguments)
    print(page)
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / "tiers.json").write_text(json.dumps([asdict(each) for each in measured], indent=2) + "\n")
    if arguments.publish is not None:
        arguments.publish.write_text(page)
    missed = [each.what for each in measured if not each.held]
    if missed:
        print(f"FAILED: missed: {'; '.join(missed)}")
    return 1 if missed else 0


def _page(measured: list[Requirement], began: datetime, arguments: argparse.Namespace) -> str:
    rows = "\n".join(_row(each) for each in measured)
    return (
        "# Adapters on disk, in memory and on the device\n\n"
        f"{began.isoformat(timespec='seconds')}, {describe_machine()}. SmolLM2-135M-Instruct in bfloat16, adapters of "
        f"rank 16 on all seven linears unless said otherwise; medians of {arguments.rounds} rounds in turns.\n\n"
        f"| what | bound | measured | | |\n|---|---:|---:|---|---|\n{rows}\n\n"
        f"Command: `python -m loadtest tiers --cells {arguments.cells} --rounds {arguments.rounds}`\n"
    )


def _row(each: Requirement) -> str:
    bound = f"at {'most' if each.at_most else 'least'} {each.bound:g}"
    verdict = "held" if each.held else "**missed**"
    return f"| {each.what} | {bound} | {each.value:.2f} | {verdict} | {each.note} |"
