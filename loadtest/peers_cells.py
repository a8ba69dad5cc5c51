"""What is measured: loads that every server gets, and pairs of loads that only ours gets, one over the other.

Within a round everyone is sent the same prompts, and no prompt is ever sent to a server twice. Knows no server.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from loadtest.workload import Workload

NUM_ADAPTERS = 32  # that every server has loaded
FEW_ADAPTERS, MANY_ADAPTERS = 5, 1000
_SEEDS_PER_ROUND = 1000


class Load(StrEnum):
    """Which of our servers a side of a pair asks."""

    LOADED = "loaded"  # with NUM_ADAPTERS adapters
    BARE = "bare"  # without any
    FEW = "few"
    MANY = "many"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A load for every server. `adapters` 0 is the base only; `peft` says whether PEFT's server gets it too."""

    name: str
    in_flight: int
    adapters: int
    num_requests: int
    peft: bool = False

    @property
    def title(self) -> str:
        over = f"over {self.adapters} adapters" if self.adapters else "base only"
        return f"{self.in_flight} in flight {over}"

    def workload(self, base: str, adapters: tuple[str, ...]) -> Workload:
        models = adapters[: self.adapters] if self.adapters else (base,)
        return Workload(models=models, in_flight=self.in_flight, num_requests=self.num_requests)


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One load of a pair. `adapters` 0 is the base only; a None means all that the server has."""

    server: Load
    in_flight: int
    adapters: int | None
    num_requests: int
    popularity: str = "round-robin"

    def workload(self, base: str, adapters: tuple[str, ...]) -> Workload:
        models = (base,) if self.adapters == 0 else adapters[: self.adapters]
        return Workload(
            models=models, in_flight=self.in_flight, num_requests=self.num_requests, popularity=self.popularity
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two loads whose ratio is asked for. `decode` counts only the time in which all rows decode."""

    name: str
    title: str
    over: Side
    under: Side
    decode: bool = False
    repeats: int = 1  # a round; every other one the other way round


def _eta(rows: int) -> Pair:
    lora = Side(server=Load.LOADED, in_flight=rows, adapters=rows, num_requests=rows)
    title = f"decode, {rows} rows of {rows} adapters over {rows} rows of the base"
    return Pair(name=f"eta-{rows}", title=title, over=lora, under=replace(lora, adapters=0), decode=True)


_MIXED = Side(server=Load.LOADED, in_flight=8, adapters=8, num_requests=8)
_BASE_ONLY = Side(server=Load.LOADED, in_flight=8, adapters=0, num_requests=32)
_MANY = Side(server=Load.MANY, in_flight=8, adapters=None, num_requests=32, popularity="zipf")

CELLS = (
    Cell(name="8x32", in_flight=8, adapters=NUM_ADAPTERS, num_requests=32),
    Cell(name="32x32", in_flight=32, adapters=NUM_ADAPTERS, num_requests=32, peft=True),
    Cell(name="1xbase", in_flight=1, adapters=0, num_requests=3),
    Cell(name="32xbase", in_flight=32, adapters=0, num_requests=32),
)
PAIRS = (
    _eta(8),
    _eta(32),
    Pair(
        name="mixed",
        title="8 adapters in one batch over the same requests one adapter at a time",
        over=_MIXED,
        under=replace(_MIXED, in_flight=1),
    ),
    Pair(
        name="base-loaded",
        title=f"base only, {NUM_ADAPTERS} adapters loaded over none",
        over=_BASE_ONLY,
        under=replace(_BASE_ONLY, server=Load.BARE),
        repeats=2,
    ),
    Pair(
        name="many",
        title="1,000 registered adapters (zipf 1) over 5, 8 in flight",
        over=_MANY,
        under=replace(_MANY, server=Load.FEW, popularity="round-robin"),
    ),
)
GROUPS: Mapping[str, tuple[str, ...]] = {
    "peers": tuple(cell.name for cell in CELLS),
    "own": tuple(pair.name for pair in PAIRS),
}


def select(names: str | None) -> tuple[tuple[Cell, ...], tuple[Pair, ...]]:
    """The cells and pairs in a comma-separated list of names and groups; all of them for None."""
    if names is None:
        return CELLS, PAIRS
    wanted = {each for name in names.split(",") for each in GROUPS.get(name, (name,))}
    known = [each.name for each in (*CELLS, *PAIRS)]
    if unknown := sorted(wanted - set(known)):
        raise ValueError(f"no cell {', '.join(unknown)}; there are {', '.join((*GROUPS, *known))}")
    return tuple(c for c in CELLS if c.name in wanted), tuple(p for p in PAIRS if p.name in wanted)


def output_tokens(*, quick: bool) -> int:
    return 16 if quick else 64


def seeded(workload: Workload, *, round_number: int, place: int, quick: bool) -> Workload:
    """`workload` with prompts that only this place of this round has; a quick one sends no more than fit at once."""
    return replace(
        workload,
        seed=round_number * _SEEDS_PER_ROUND + place,
        num_requests=workload.in_flight if quick else workload.num_requests,
        max_tokens=output_tokens(quick=quick),
    )
