"""Times all cases family by family, holds the LoRA operation against its limit, writes JSON and a page.

The limit is of one LoRA call, median against the floor of its bytes, at 8 and 32 rows with distinct adapters; the sum
over a step's calls, which is what a request feels, is held against it too.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, NamedTuple

import torch

from adapters.ops.thread_team import ThreadTeam, current_team, start_team
from loadtest import kernels_cases
from loadtest.gpu.report import table
from loadtest.kernels import KernelSettings
from loadtest.kernels_cases import LORA, NUM_LAYERS, Sizes
from loadtest.kernels_timing import Case, Ceilings, Probe, Reading, last_cache_bytes, time_cases
from loadtest.peers_endpoints import Programs
from loadtest.peers_versions import versions_of
from loadtest.report import describe_machine

MAX_OVER_BYTES = 1.5  # of the byte floor, for the LoRA operation
CHECKED_ROWS = (8, 32)
_CACHES = 4  # times the last cache, so that nothing is left from the pass before
_QUICK_BYTES, _QUICK_ROUNDS, _QUICK_PRODUCT = 1 << 20, 2, 128
_PRODUCT = 2048  # rows and columns of the matrices whose product gives the rate of arithmetic
_MICRO = 1e6


class Timed(NamedTuple):
    """A case without its data, with what one call of it took."""

    op: str
    shape: str
    size: str
    rows: int
    calls_per_step: int
    seconds: Reading
    byte_floor: float
    flop_floor: float
    least_byte_floor: float  # at the best reading of the bandwidth, for the least time

    @property
    def over_floor(self) -> float:
        return self.seconds.median / max(self.byte_floor, self.flop_floor)

    @property
    def least_over_floor(self) -> float:
        return self.seconds.least / max(self.least_byte_floor, self.flop_floor)

    def line(self) -> dict[str, Any]:
        return {
            "op": self.op,
            "shape": self.shape,
            "size": self.size,
            "µs, least": self.seconds.least * _MICRO,
            "µs, median": self.seconds.median * _MICRO,
            "byte floor µs": self.byte_floor * _MICRO,
            "flop floor µs": self.flop_floor * _MICRO,
            "median over floor": self.over_floor,
            "least over floor": self.least_over_floor,
        }


def measure(settings: KernelSettings) -> int:
    """Print, write; 1 when the LoRA operation is over its limit and that is checked."""
    sizes = Sizes(_QUICK_BYTES, num_layers=1) if settings.quick else Sizes(_CACHES * last_cache_bytes())
    rounds = _QUICK_ROUNDS if settings.quick else settings.rounds
    load = os.getloadavg()[0]
    measured: list[tuple[str, Case, Reading]] = []
    ceilings: dict[str, Ceilings] = {}
    with torch.inference_mode(), _threads(settings.threads or len(os.sched_getaffinity(0))) as team:
        probe = Probe(team, sizes.working_set, _QUICK_PRODUCT if settings.quick else _PRODUCT)
        for family, cases in kernels_cases.families(sizes, team):
            print(f"Timing {family}: {len(cases)} cases, {rounds} rounds", flush=True)
            readings, ceilings[family] = time_cases(cases, team, probe, rounds)
            measured += [(family, case.emptied(), each) for case, each in zip(cases, readings, strict=True)]
            del cases  # its data, before the next family's are made
        # What the processor can do does not depend on the family: a slower product was disturbed.
        flops = max(each.flops for each in ceilings.values())
        ceilings = {family: replace(each, flops=flops) for family, each in ceilings.items()}
        timed = [_timed(case, reading, ceilings[family]) for family, case, reading in measured]
        record = _record(settings, timed, ceilings, team.num_threads, sizes.working_set, load)
    page = _page(record)
    print(f"\n{page}")
    _write(settings, record, page)
    if settings.check and not settings.quick and any(not verdict["holds"] for verdict in record["limits"]):
        print(f"FAILED: LoRA takes over {MAX_OVER_BYTES:g} × its byte floor where the last table says so")
        return 1
    return 0


def limits(timed: Sequence[Timed]) -> list[dict[str, Any]]:
    """What must hold: for each LoRA shape and for a step's LoRA calls together, at each checked number of rows."""
    found = []
    for rows in CHECKED_ROWS:
        each = [case for case in timed if case.op == LORA and case.rows == rows]
        for case in each:
            found.append(_limit(case.shape, rows, case.seconds.median, case.byte_floor))
        step = sum(case.calls_per_step * case.seconds.median for case in each)
        floor = sum(case.calls_per_step * case.byte_floor for case in each)
        found.append(_limit("a whole step", rows, step, floor))
    return found


def _limit(what: str, rows: int, seconds: float, floor: float) -> dict[str, Any]:
    return {
        "LoRA": what,
        "rows": rows,
        "µs, median": seconds * _MICRO,
        "byte floor µs": floor * _MICRO,
        "over byte floor": seconds / floor,
        "limit": MAX_OVER_BYTES,
        "holds": seconds <= MAX_OVER_BYTES * floor,
    }


def _timed(case: Case, seconds: Reading, ceilings: Ceilings) -> Timed:
    calls = NUM_LAYERS * case.per_layer
    floors = *ceilings.floors(case), case.num_bytes / ceilings.best_read_bytes
    return Timed(case.op, case.shape, case.size, case.rows, calls, seconds, *floors)


@contextmanager
def _threads(count: int) -> Iterator[ThreadTeam]:
    """The process's team as the engine has it, and torch alone, until the measurement is over."""
    team_before, torch_before = current_team().num_threads, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield start_team(count)
    finally:
        start_team(team_before)
        torch.set_num_threads(torch_before)


def _record(
    settings: KernelSettings,
    timed: Sequence[Timed],
    ceilings: dict[str, Ceilings],
    threads: int,
    working_set: int,
    load: float,
) -> dict[str, Any]:
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "versions": versions_of((), Programs()),
        "command": "python -m loadtest " + " ".join(sys.argv[1:]),
        "quick": settings.quick,
        "threads": threads,
        "working_set": working_set,
        "load_before": load,
        "ceilings": [_ceiling_line(family, each) for family, each in ceilings.items()],
        "operations": [case.line() for case in timed],
        "limits": limits(timed),
    }


def _ceiling_line(family: str, ceilings: Ceilings) -> dict[str, Any]:
    return {
        "beside": family,
        "read GB/s": ceilings.read_bytes / 1e9,
        "best": ceilings.best_read_bytes / 1e9,
        "copy GB/s": ceilings.copy_bytes / 1e9,
        "bf16 GFLOP/s": ceilings.flops / 1e9,
    }


def _page(record: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        "# CPU operations against their floors",
        "",
        f"{record['when']}; {record['machine']}, {record['threads']} threads, load {record['load_before']:.1f} before; "
        f"{versions}. `{record['command']}`",
        "",
        f"Each reading is a pass over at least {record['working_set'] >> 20} MiB, so that every call finds its weights "
        "in memory and not in the cache. A floor is a call's bytes or arithmetic at the rate measured beside it: the "
        "median time is held against the median bandwidth of the same rounds, the least against the best. Calls of "
        "decode rows are played from a recording, as the engine runs them; those of a prompt are made by Python.",
    ]
    if record["quick"]:
        lines += ["", "**Quick: the data fit in the cache, so these figures say only that everything runs.**"]
    for title, name in (("Ceilings", "ceilings"), ("Operations", "operations"), ("The limit of LoRA", "limits")):
        lines += ["", f"## {title}", "", *table(record[name])]
    return "\n".join(lines) + "\n"


def _write(settings: KernelSettings, record: dict[str, Any], page: str) -> None:
    settings.results.mkdir(parents=True, exist_ok=True)
    stem = datetime.now(UTC).strftime("kernels-%Y%m%d-%H%M%S")
    path = settings.results / f"{stem}.json"
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    path.with_suffix(".md").write_text(page)
    print(f"Written to {path}")
    if settings.publish is not None:
        settings.publish.parent.mkdir(parents=True, exist_ok=True)
        settings.publish.write_text(page)
