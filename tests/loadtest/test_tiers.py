"""What the figures about adapters' tiers demand of the server, without one: what did not take place is no figure."""

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loadtest.client import LoadTestFailed
from loadtest.exposition import value
from loadtest.peers_requirements import Requirement
from loadtest.tier_proofs import check_mixed, check_registered, falls_short, loads_done
from loadtest.tier_requests import Answer, Asker
from loadtest.tiers import in_turns
from loadtest.tiers_beside import traffic_beside


def page(**counts: float) -> str:
    """adapter_loads_total by result."""
    return "\n".join(f'loramux:adapter_loads_total{{model_name="m",result="{k}"}} {v}' for k, v in counts.items())


def test_a_series_can_be_read_by_its_labels() -> None:
    text = page(loaded=3, replaced=4, failed=5)
    assert value(text, "loramux:adapter_loads_total") == 12
    assert value(text, "loramux:adapter_loads_total", result="loaded") == 3
    assert value(text, "loramux:adapter_loads_total", result="load") is None
    assert value("plain 2", "plain") == 2 and value("plain 2", "plain", result="loaded") is None


class StubAsker(Asker):
    """Traffic of half a second; one load at a time, each of which takes `load_seconds` and ends as `result`."""

    def __init__(self, load_seconds: float, result: Callable[[int], str]) -> None:
        self._load_seconds = load_seconds
        self._result = result
        self._one_at_a_time = asyncio.Lock()
        self._numbers = itertools.count()
        self.counts = {"loaded": 7.0, "replaced": 0.0, "refused": 0.0, "failed": 0.0}

    async def together(self, models: Sequence[str], in_flight: int, max_tokens: int) -> tuple[float, list[Answer]]:
        await asyncio.sleep(0.5)
        return 1.0, [Answer(0.0, (), max_tokens) for _ in models]

    async def load(self, name: str, source: str, *, wait: float = 60.0) -> None:
        result = self._result(next(self._numbers))
        async with self._one_at_a_time:
            await asyncio.sleep(self._load_seconds)
            self.counts[result] += 1
        if result == "raises":
            raise LoadTestFailed("the disk is full")

    async def metrics(self) -> str:
        return page(**self.counts)


def beside(stub: StubAsker) -> float:
    def begin(number: int) -> Coroutine[Any, Any, None]:
        return stub.load("beside", str(number))

    answers, rate = asyncio.run(traffic_beside(stub, ["a", "b"], 4, begin, loads_done, 40))
    assert len(answers) == 2
    return rate


def test_loads_that_keep_up_are_counted() -> None:
    assert 36 <= beside(StubAsker(0.0, lambda number: "replaced" if number else "loaded")) <= 44


def test_loads_that_were_done_after_the_traffic_do_not_count() -> None:
    stub = StubAsker(0.1, lambda _: "replaced")
    rate = beside(stub)
    assert rate < 15 and falls_short(rate, 40)
    assert stub.counts["replaced"] > 15, "what was still waiting was not awaited"


def test_a_figure_that_fell_short_is_missed_whatever_its_value() -> None:
    kept = Requirement(what="x", bound=1.3, value=1.0, at_most=True)
    assert kept.held and replace(kept, fell_short=True).held is False


@pytest.mark.parametrize("result", ["refused", "failed"])
def test_loads_that_brought_nothing_do_not_count(result: str) -> None:
    assert beside(StubAsker(0.0, lambda _: result)) == 0


def test_a_load_that_failed_fails_the_figure() -> None:
    stub = StubAsker(0.0, lambda number: "raises" if number == 3 else "replaced")
    stub.counts["raises"] = 0
    with pytest.raises(LoadTestFailed, match="1 of those beside the traffic failed, first the disk is full"):
        beside(stub)


class StubDevice(Asker):
    """A device with room for two adapters, where the first that came leaves first."""

    def __init__(self, *, counts: bool = True) -> None:
        self.passes: list[set[str]] = []
        self._counts = counts
        self._held: list[str] = []
        self._activations = self._evictions = 0

    async def together(self, models: Sequence[str], in_flight: int, max_tokens: int) -> tuple[float, list[Answer]]:
        self.passes.append(set(models))
        for model in models:
            if model not in self._held:
                self._activations += self._counts
                self._evictions += len(self._held) == 2
                self._held = [*self._held[-1:], model]
        return float(len(self.passes)), []

    async def metrics(self) -> str:
        return (
            f'loramux:adapter_activations_total{{model_name="m"}} {self._activations}\n'
            'loramux:adapter_evictions_total{model_name="m",tier="host"} 1000\n'
            f'loramux:adapter_evictions_total{{model_name="m",tier="device"}} {self._evictions}'
        )


def test_sides_take_turns_after_a_warm_up_that_is_not_counted() -> None:
    stub = StubDevice()
    folders = [Path(name) for name in "abcd"]
    fitting, larger = asyncio.run(in_turns(stub, folders[:2], folders, 3))
    assert [len(names) for names in stub.passes] == [4, 2, 2, 4, 4, 2, 2, 4]
    assert [each.rate for each in fitting] == [3, 6, 7] and [each.rate for each in larger] == [4, 5, 8]
    assert fitting[0].moves.activations == 0 < larger[0].moves.activations == larger[0].moves.evictions


def test_a_larger_set_that_moved_nothing_is_no_figure() -> None:
    with pytest.raises(LoadTestFailed, match="brought no adapter to the device"):
        asyncio.run(in_turns(StubDevice(counts=False), [Path("a")], [Path("a"), Path("b")], 1))


def test_as_many_names_must_be_registered_as_the_figure_says() -> None:
    states = {"registered": 1984, "ready": 12, "active": 4, "failed": 1, "draining": 2, "fetching": 3}
    text = "\n".join(f'loramux:adapters{{model_name="m",state="{state}"}} {n}' for state, n in states.items())
    check_registered(text, 2000)
    for count in (1999, 2006):
        with pytest.raises(LoadTestFailed, match=f"2000 adapters are registered, not {count}"):
            check_registered(text, count)
    with pytest.raises(LoadTestFailed, match="0 adapters are registered, not 16"):
        check_registered("", 16)


def pools_page(ranks: Sequence[int], activations: int, evictions: int) -> str:
    held = [
        f'vllm:lora_adapter_loaded{{adapter_name="a{at}",level="gpu",model_name="m",pinned="false",rank="{rank}"}} 1'
        for at, rank in enumerate(ranks)
    ]
    return "\n".join(
        [
            *held,
            'vllm:lora_adapter_loaded{adapter_name="b",level="cpu",model_name="m",pinned="false",rank="64"} 1',
            f'loramux:adapter_activations_total{{model_name="m"}} {activations}',
            f'loramux:adapter_evictions_total{{model_name="m",tier="device"}} {evictions}',
        ]
    )


@pytest.mark.parametrize(
    ("rounds", "fault"),
    [
        ([((8, 16), 5, 2), ((32, 64), 9, 6)], None),
        ([((8, 16), 5, 2), ((32, 8), 9, 6)], "never held an adapter of rank 64"),
        ([((8, 16), 0, 0), ((32, 64), 0, 0)], "brought no adapter to the device"),
        ([((8, 16), 2, 0), ((32, 64), 4, 0)], "no adapter had to leave the pools"),
    ],
)
def test_pools_must_have_held_every_rank_and_given_rows_out_again(
    rounds: list[tuple[tuple[int, ...], int, int]], fault: str | None
) -> None:
    pages = [pools_page((), 0, 0), *(pools_page(*each) for each in rounds)]
    if fault is None:
        check_mixed(pages, (8, 16, 32, 64))
        return
    with pytest.raises(LoadTestFailed, match=fault):
        check_mixed(pages, (8, 16, 32, 64))
