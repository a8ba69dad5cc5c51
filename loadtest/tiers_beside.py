"""What adapters that come in cost those who decode meanwhile: gaps between tokens of eight streams, alone and beside.

Loads over HTTP read, check, store and register other bytes; cold loads bring what is registered from disk to device,
because a request asks for it. Counts are taken while the traffic runs, and only of what was done.
"""

import statistics
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from loadtest import tier_proofs
from loadtest.peers_requirements import Requirement
from loadtest.tier_requests import Answer, Asker, asker, repeating

Begin = Callable[[int], Coroutine[Any, Any, object]]
"""Begins one more of what is done beside the traffic, by its number."""

_STREAMS, _TOKENS, _A_SECOND, _BOUND = 8, 250, 10, 1.3


async def loads_beside(url: str, folders: Sequence[Path], rounds: int) -> Requirement:
    """The first eight decode; the rest replace one another under four names."""
    sources = [str(folder) for folder in folders[_STREAMS:]]
    async with asker(url) as one:
        await one.load_all((folder.name, str(folder)) for folder in folders[:_STREAMS])

        def begin(number: int) -> Coroutine[Any, Any, object]:
            return one.load(f"beside{number % 4}", sources[number % len(sources)])

        what = f"ITL p99 of 8 streams beside {_A_SECOND} loads of 10 MB a second over HTTP, over alone"
        return await _compared(one, folders, rounds, begin, tier_proofs.loads_done, what)


async def cold_loads_beside(url: str, folders: Sequence[Path], rounds: int) -> Requirement:
    """The first eight decode; the rest are asked for one after the other, a prompt of one token and one token more."""
    async with asker(url) as one:
        await one.load_all((folder.name, str(folder)) for folder in folders)
        others = [folder.name for folder in folders[_STREAMS:]]

        def begin(number: int) -> Coroutine[Any, Any, object]:
            return one.ask(others[number % len(others)], 1, prompt_tokens=1)

        what = f"ITL p99 of 8 streams beside {_A_SECOND} adapters of 10 MB a second from disk to device, over alone"
        return await _compared(one, folders, rounds, begin, tier_proofs.cold_loads, what)


async def _compared(
    one: Asker, folders: Sequence[Path], rounds: int, begin: Begin, count: Callable[[str], float], what: str
) -> Requirement:
    models = [folder.name for folder in folders[:_STREAMS]]
    alone, beside, rates = list[float](), list[float](), list[float]()
    await one.together(models, _STREAMS, 16)
    for _ in range(rounds):
        alone.append(_p99((await one.together(models, _STREAMS, _TOKENS))[1]))
        answers, rate = await traffic_beside(one, models, _TOKENS, begin, count, _A_SECOND)
        beside.append(_p99(answers))
        rates.append(rate)
    medians = statistics.median(beside), statistics.median(alone)
    fell_short = tier_proofs.falls_short(min(rates), _A_SECOND)
    note = f"{medians[0] * 1e3:.1f} ms over {medians[1] * 1e3:.1f} ms; {statistics.mean(rates):.1f} a second"
    return Requirement(
        what=what,
        bound=_BOUND,
        value=medians[0] / medians[1],
        at_most=True,
        note=note + (" were reached" if fell_short else ""),
        fell_short=fell_short,
    )


async def traffic_beside(
    one: Asker, models: Sequence[str], max_tokens: int, begin: Begin, count: Callable[[str], float], rate: float
) -> tuple[list[Answer], float]:
    """A stream of each model while `begin` is done `rate` times a second; the answers, and how many a second were done
    before the last of them ended.
    """
    async with repeating(begin, rate):
        before, began = await one.metrics(), time.monotonic()
        answers = (await one.together(models, len(models), max_tokens))[1]
        after, seconds = await one.metrics(), time.monotonic() - began
    return answers, (count(after) - count(before)) / seconds


def _p99(answers: Sequence[Answer]) -> float:
    gaps = sorted(gap for answer in answers for gap in answer.gaps)
    return float(gaps[int(0.99 * (len(gaps) - 1))])
