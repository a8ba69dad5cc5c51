"""The rounds: every server in turn, one running at a time, the order turned from round to round.

Knows what is sent to whom and nothing of what the figures mean.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from loadtest.peers_cells import Cell, Load, Pair, Side, seeded
from loadtest.peers_endpoints import PEFT, Contender, Endpoint
from loadtest.peers_measure import Measured, measure_once, warm_up

_PAIR_PLACES = 100  # seeds of pairs begin here, those of cells at 0

Save = Callable[[], None]


@dataclass(slots=True)
class Results:
    """Everything measured so far: (cell, server) → one a round, (pair, "over" or "under") → one a repeat."""

    cells: dict[tuple[str, str], list[Measured]] = field(default_factory=dict)
    pairs: dict[tuple[str, str], list[Measured]] = field(default_factory=dict)

    def of_cell(self, cell: str, server: str) -> list[Measured]:
        return self.cells.setdefault((cell, server), [])

    def of_pair(self, pair: str, side: str) -> list[Measured]:
        return self.pairs.setdefault((pair, side), [])


def endpoint_for(cell: Cell, contender: Contender) -> Endpoint | None:
    """Who answers `cell` for a contender; None when it does not take part."""
    if contender.name == PEFT and not cell.peft:
        return None
    return contender.for_adapters if cell.adapters else contender.for_base


async def measure_cells(
    contenders: Sequence[Contender], cells: Sequence[Cell], results: Results, *, rounds: int, quick: bool, save: Save
) -> None:
    await _warm_up_cells(contenders, cells)
    for number in range(rounds):
        for place, cell in enumerate(cells):
            for contender in _turned(contenders, number):
                endpoint = endpoint_for(cell, contender)
                if endpoint is None:
                    continue
                plain = cell.workload(endpoint.base_model, endpoint.adapters)
                workload = seeded(plain, round_number=number, place=place, quick=quick)
                found = await measure_once(endpoint, workload)
                results.of_cell(cell.name, contender.name).append(found)
                _say(f"round {number + 1} of {rounds}, {cell.name}, {contender.name}", found)
                save()


async def measure_pairs(
    servers: dict[Load, Endpoint],
    pairs: Sequence[Pair],
    results: Results,
    *,
    rounds: int,
    quick: bool,
    save: Save,
) -> None:
    await _warm_up_pairs(servers, pairs)
    for number in range(rounds):
        for index, pair in enumerate(pairs):
            for repeat in range(pair.repeats):
                sides = [("over", pair.over), ("under", pair.under)]
                for name, side in sides if (number + repeat) % 2 == 0 else reversed(sides):
                    endpoint = servers[side.server]
                    # The two sides have prompts of their own: the second must not find the first one's in a cache.
                    place = _PAIR_PLACES + 10 * index + 2 * repeat + (name == "over")
                    plain = side.workload(endpoint.base_model, endpoint.adapters)
                    workload = seeded(plain, round_number=number, place=place, quick=quick)
                    found = await measure_once(endpoint, workload)
                    results.of_pair(pair.name, name).append(found)
                    _say(f"round {number + 1} of {rounds}, {pair.name} {name}", found)
                    save()


async def _warm_up_cells(contenders: Sequence[Contender], cells: Sequence[Cell]) -> None:
    """Each endpoint once with the largest load it will get."""
    largest: dict[str, tuple[Endpoint, Cell]] = {}
    for cell in sorted(cells, key=lambda each: each.in_flight):
        for contender in contenders:
            if (endpoint := endpoint_for(cell, contender)) is not None:
                largest[endpoint.name] = (endpoint, cell)
    for endpoint, cell in largest.values():
        print(f"Warming up {endpoint.name}", flush=True)
        await warm_up(endpoint, cell.workload(endpoint.base_model, endpoint.adapters))


async def _warm_up_pairs(servers: dict[Load, Endpoint], pairs: Sequence[Pair]) -> None:
    sides = sorted((side for pair in pairs for side in (pair.over, pair.under)), key=lambda each: each.in_flight)
    largest: dict[Load, Side] = {side.server: side for side in sides}
    for load, side in largest.items():
        endpoint = servers[load]
        print(f"Warming up {endpoint.name}", flush=True)
        await warm_up(endpoint, side.workload(endpoint.base_model, endpoint.adapters))


def _turned(contenders: Sequence[Contender], number: int) -> list[Contender]:
    """Another one begins each round, so that nobody always follows the same one."""
    first = number % len(contenders)
    return [*contenders[first:], *contenders[:first]]


def _say(what: str, found: Measured) -> None:
    figures = found.figures
    decode = "" if found.decode is None else f", decoding {found.decode.tokens_per_second:.1f} tok/s"
    print(
        f"{what}: {figures.output_tokens_per_second:.1f} output tok/s in {figures.wall_seconds:.1f} s, "
        f"TTFT p50 {figures.ttft_ms.p50:.0f} ms{decode}",
        flush=True,
    )
