"""What a server's metrics must show before a figure about adapters' tiers means anything.

Each check raises LoadTestFailed where what is compared did not take place. Knows nothing of requests and of ratios.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loadtest.client import LoadTestFailed
from loadtest.exposition import value

_LEAST_SHARE = 0.9  # of the loads that were asked for


@dataclass(frozen=True, slots=True)
class Moves:
    """Adapters copied into the device's pools, and those that made room there."""

    activations: float
    evictions: float


def moves(before: str, after: str) -> Moves:
    """Between two pages."""
    return Moves(*(late - early for early, late in zip(_moves_so_far(before), _moves_so_far(after), strict=True)))


def check_moved(found: Moves, what: str) -> None:
    if not found.activations:
        raise LoadTestFailed(f"{what} brought no adapter to the device")


def check_registered(page: str, count: int) -> None:
    """As many names as `count`, and no more, stand for a version."""
    found = sum(value(page, "loramux:adapters", state=each) or 0.0 for each in ("registered", "ready", "active"))
    if found != count:
        raise LoadTestFailed(f"{found:g} adapters are registered, not {count}")


def ranks_on_device(page: str) -> list[int]:
    """The rank of each adapter that has rows in the device's pools."""
    lines = (line for line in page.splitlines() if line.startswith("vllm:lora_adapter_loaded{"))
    return [int(line.split('rank="')[1].split('"')[0]) for line in lines if 'level="gpu"' in line]


def check_mixed(pages: Sequence[str], ranks: Iterable[int]) -> None:
    """The pools held each of `ranks` on some page, and adapters left them between the first page and the last."""
    if missing := set(ranks).difference(*map(ranks_on_device, pages)):
        raise LoadTestFailed(f"the pools never held an adapter of rank {'/'.join(map(str, sorted(missing)))}")
    found = moves(pages[0], pages[-1])
    check_moved(found, "the traffic over mixed ranks")
    if not found.evictions:
        raise LoadTestFailed("no adapter had to leave the pools, so their rows were given out once only")


def loads_done(page: str) -> float:
    """Loads that brought other bytes; refused, failed and unchanged ones brought none."""
    return sum(value(page, "loramux:adapter_loads_total", result=each) or 0.0 for each in ("loaded", "replaced"))


def cold_loads(page: str) -> float:
    """Adapters that were read from disk for a request."""
    return value(page, "loramux:adapter_cold_loads_total", result="loaded") or 0.0


def falls_short(reached: float, asked: float) -> bool:
    """Too few loads a second for a figure that says `asked`."""
    return reached < _LEAST_SHARE * asked


def _moves_so_far(page: str) -> tuple[float, float]:
    activations = value(page, "loramux:adapter_activations_total") or 0.0
    return activations, value(page, "loramux:adapter_evictions_total", tier="device") or 0.0
