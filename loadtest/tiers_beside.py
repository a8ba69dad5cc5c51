"""What adapters that come in cost those who decode meanwhile: gaps between tokens of eight streams, with and without.

Loads over HTTP read, check, store and register other bytes. Cold loads bring what is registered from disk to device,
because a request asks for it; on the other side as many requests ask for adapters that are there, since a prompt has
its own price. Counts are taken while the traffic runs, and only of what was done.
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


async def loads_beside(url: str, folders: Sequence[Path], rounds: int, where: str = "") -> Requirement:
    """The first eight decode; the rest replace one another under four names."""
    sources = [str(folder) for folder in folders[_STREAMS:]]
    async with asker(url) as one:
        await one.load_all((folder.name, str(folder)) for folder in folders[:_STREAMS])

        def begin(number: int) -> Coroutine[Any, Any, object]:
            return one.load(f"beside{number % 4}", sources[number % len(sources)])

        what = f"ITL p99 of 8 streams beside {_A_SECOND} loads of 10 MB a second over HTTP, over alone{where}"
        return await _compared(one, folders, rounds, (begin, None), tier_proofs.loads_done, what)


async def cold_loads_beside(url: str, folders: Sequence[Path], rounds: int) -> Requirement:
    """The first eight decode; the rest are asked for one after the other, a prompt of one token and one token more. On
    the other side these requests ask for the first eight as well.
    """
    async with asker(url) as one:
        await one.load_all((folder.name, str(folder)) for folder in folders)
        warm, cold = ([folder.name for folder in some] for some in (folders[:_STREAMS], folders[_STREAMS:]))

        def asking(models: Sequence[str]) -> Begin:
            return lambda number: one.ask(models[number % len(models)], 1, prompt_tokens=1)

        what = f"ITL p99 of 8 streams beside {_A_SECOND} requests a second, each for an adapter of 10 MB on disk, "
        what += "over requests for adapters on the device"
        return await _compared(one, folders, rounds, (asking(cold), asking(warm)), tier_proofs.cold_loads, what)


async def _compared(
    one: Asker,
    folders: Sequence[Path],
    rounds: int,
    sides: tuple[Begin, Begin | None],
    count: Callable[[str], float],
    what: str,
) -> Requirement:
    """With the first of `sides` beside the traffic, over with the second, or with nothing."""
    models = [folder.name for folder in folders[:_STREAMS]]
    without, beside, rates = list[float](), list[float](), list[float]()
    await one.together(models, _STREAMS, 16)
    for _ in range(rounds):
        if sides[1] is None:
            answers = (await one.together(models, _STREAMS, _TOKENS))[1]
        else:
            answers, _ = await traffic_beside(one, models, _TOKENS, sides[1], count, _A_SECOND)
        without.append(_p99(answers))
        answers, rate = await traffic_beside(one, models, _TOKENS, sides[0], count, _A_SECOND)
        beside.append(_p99(answers))
        rates.append(rate)
    medians = statistics.median(beside), statistics.median(without)
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
