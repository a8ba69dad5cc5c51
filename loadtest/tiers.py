"""What adapters on disk, in host memory and on the device cost: seven figures, each a ratio of two sides of one run.

Knows how each is measured and its bound; nothing of tables. Every figure proves from the server's metrics that what it
compares took place.
"""

import asyncio
import os
import random
import statistics
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from loadtest import server_commands, servers, tier_proofs
from loadtest.churn_adapters import linear_shapes, pool_bytes, write_sources
from loadtest.client import LoadTestFailed
from loadtest.exposition import value
from loadtest.peers_requirements import Requirement
from loadtest.peers_weights import Weights, base_folder
from loadtest.peft_adapters import write_adapter
from loadtest.popularity import parse_popularity
from loadtest.tier_requests import Asker, asker
from loadtest.tiers_beside import cold_loads_beside, loads_beside

Measure = Callable[[str], Coroutine[Any, Any, Requirement]]
"""Takes a figure from the server at a URL."""

_ROOM = 16  # adapters on the device, where it is short
_REQUESTS = 128  # of a round
_MIXED_RANKS = (8, 16, 32, 64)
_MEAN_CHURN_RANK = 16  # what `pool_bytes` counts an adapter as


class Tiers:
    """`rounds` of each side, in turns; logs go to `results`."""

    def __init__(self, weights: Weights, scratch: Path, results: Path, rounds: int) -> None:
        self._weights = weights
        self._scratch = scratch
        self._results = results
        self._rounds = rounds

    def cold_start(self) -> Requirement:
        """Host room for one adapter, so that each next one is read from disk, which the system does not hold in its
        own cache either; then it is asked for again.
        """
        state = self._scratch / "cold"

        async def measure(url: str) -> Requirement:
            folders = self._weights.peft_adapters(6)
            async with asker(url) as one:
                await one.load_all((folder.name, str(folder)) for folder in folders)
                await one.ask(folders[0].name, 2)
                before = tier_proofs.cold_loads(await one.metrics())
                cold, warm = [], []
                for number in range(10 * self._rounds):
                    name = folders[(number + 1) % len(folders)].name
                    await asyncio.to_thread(_leave_page_cache, state)
                    cold.append((await one.ask(name, 2)).first_token)
                    warm.append((await one.ask(name, 2)).first_token)
                loads = tier_proofs.cold_loads(await one.metrics()) - before
            if loads != len(cold):
                raise LoadTestFailed(f"{loads:g} adapters were read from disk for {len(cold)} requests that need it")
            medians = statistics.median(cold), statistics.median(warm)
            note = f"{medians[0] * 1e3:.0f} ms over {medians[1] * 1e3:.0f} ms, {len(cold)} each"
            what = "TTFT of a 10 MB adapter from disk over one in memory, prompts of 64 tokens"
            return Requirement(what=what, bound=1.5, value=medians[0] / medians[1], at_most=True, note=note)

        return self._on("cold", measure, "--max-cpu-loras", "1", "--state-dir", str(state))

    def loads_beside(self) -> Requirement:
        """Eight streams of eight adapters, alone and while others are loaded over HTTP."""
        folders = self._weights.peft_adapters(8 + 40)
        return self._on("beside", lambda url: loads_beside(url, folders, self._rounds))

    def loads_beside_spare(self) -> Requirement:
        """The same on a server that decodes on all cores but one, alone too: what loads cost where there is a core for
        them."""
        folders = self._weights.peft_adapters(8 + 40)
        threads = max(1, len(os.sched_getaffinity(0)) - 1)
        measure = partial(loads_beside, folders=folders, rounds=self._rounds, where=", both with a core to spare")
        return self._on("beside-spare", measure, "--cpu-threads", str(threads))

    def cold_loads_beside(self) -> Requirement:
        """The same streams, alone and while others that are on disk are asked for; host memory holds few of those."""
        folders = self._weights.peft_adapters(8 + 40)
        return self._on(
            "cold-beside", lambda url: cold_loads_beside(url, folders, self._rounds), "--max-cpu-loras", "16"
        )

    def larger_than_device(self) -> Requirement:
        """Zipf over twice as many adapters as the device holds, over zipf over as many as it holds.

        Both sides run once uncounted, then in alternating order. The side that opens a round finds the pools as it
        left them itself, the other as the opening one left them; those that fit open the first round, and so, of an odd
        number, one round more.
        """

        async def measure(url: str) -> Requirement:
            folders = self._weights.peft_adapters(2 * _ROOM)
            async with asker(url) as one:
                await one.load_all((folder.name, str(folder)) for folder in folders)
                fitting, larger = await in_turns(one, folders[:_ROOM], folders, self._rounds)
            rates = [statistics.median(each.rate for each in side) for side in (larger, fitting)]
            activations = statistics.mean(each.moves.activations for each in larger)
            evictions = statistics.mean(each.moves.evictions for each in larger)
            note = f"{rates[0]:.0f} over {rates[1]:.0f} tok/s, "
            note += f"{activations:.0f} activations and {evictions:.0f} evictions a round of {_REQUESTS} requests"
            what = "tok/s, working set (zipf 1) twice the device's room over one that fits"
            return Requirement(what=what, bound=0.6, value=rates[0] / rates[1], note=note)

        room = pool_bytes(base_folder(), _ROOM, bytes_per_value=2)
        return self._on("larger", measure, "--lora-memory", str(room))

    def many_registered(self) -> Requirement:
        """The same traffic over the same 16 adapters, on a server that knows 2,000 and on one that knows these."""
        folders = self._weights.peft_adapters(_ROOM)
        tiny = self._tiny(2000 - _ROOM)
        with ExitStack() as stack:
            many = stack.enter_context(self._server("many"))
            few = stack.enter_context(self._server("few"))

            async def register(url: str, sources: Sequence[Path]) -> None:
                async with asker(url) as one:
                    await one.load_all((folder.name, str(folder)) for folder in sources)
                    tier_proofs.check_registered(await one.metrics(), len(sources))

            async def rate(server: servers.Server, number: int) -> float:
                async with asker(server.url, number) as one:
                    return (await one.together(_zipf(folders, number), 8, 48))[0]

            asyncio.run(register(many.url, [*folders, *tiny]))
            asyncio.run(register(few.url, folders))
            over, under = list[float](), list[float]()
            few.hold()
            for number in range(self._rounds + 1):  # the first warms up
                rates = []
                for server, other in ((many, few), (few, many)):
                    other.hold()
                    server.release()
                    rates.append(asyncio.run(rate(server, number)))
                if number:
                    over.append(rates[0])
                    under.append(rates[1])
            many.release()
            few.release()
        ratio = statistics.median(over) / statistics.median(under)
        note = f"{statistics.median(over):.0f} over {statistics.median(under):.0f} tok/s"
        return Requirement(
            what="tok/s, 2,000 adapters registered over 16, the same 16 asked for", bound=0.95, value=ratio, note=note
        )

    def pool_use(self) -> Requirement:
        """Rows of the pools that are held over those that adapters there need, after traffic over mixed ranks."""

        async def measure(url: str) -> Requirement:
            folders = write_sources(self._scratch / "mixed", base_folder(), 32, ranks=_MIXED_RANKS)
            async with asker(url) as one:
                await one.load_all((folder.name, str(folder)) for folder in folders)
                pages = [await one.metrics()]
                for number in range(self._rounds):
                    await one.together(_zipf(folders, number), 16, 8)
                    pages.append(page := await one.metrics())
            tier_proofs.check_mixed(pages, _MIXED_RANKS)
            useful = sum(tier_proofs.ranks_on_device(page))
            pools = next(float(x.split()[-1]) for x in page.splitlines() if 'part="lora_pools"' in x)
            held = pools / _row_bytes() - (value(page, "loramux:lora_rows_free") or 0)
            note = f"{held:.0f} rows held, {useful} of use, ranks {'/'.join(map(str, _MIXED_RANKS))}"
            what = "pool bytes held over bytes of use, ranks mixed"
            return Requirement(what=what, bound=1.05, value=held / useful, at_most=True, note=note)

        room = pool_bytes(base_folder(), 24, bytes_per_value=2)
        return self._on("pools", measure, "--lora-memory", str(room))

    def _on(self, name: str, measure: Measure, *flags: str) -> Requirement:
        with self._server(name, *flags) as server:
            return asyncio.run(measure(server.url))

    def _server(self, name: str, *flags: str) -> AbstractContextManager[servers.Server]:
        command = server_commands.loramux_command([], port := servers.free_port(), *flags)
        return servers.running(command.arguments, port=port, log=self._results / f"tiers-{name}.log")

    def _tiny(self, count: int) -> list[Path]:
        """Adapters of rank 1 on two linears: what is measured is that they are known, not what they weigh."""
        every = linear_shapes(base_folder())
        shapes = {name: every[name] for name in list(every)[:2]}
        folders = [self._scratch / "tiny" / f"t{number}" for number in range(count)]
        for number, folder in enumerate(folders):
            write_adapter(folder, shapes, number, "base", rank=1)
        return folders


@dataclass(frozen=True, slots=True)
class Pass:
    """Output tokens a second of some traffic, and what it moved on the device."""

    rate: float
    moves: tier_proofs.Moves


async def in_turns(
    one: Asker, fitting: Sequence[Path], larger: Sequence[Path], rounds: int
) -> tuple[list[Pass], list[Pass]]:
    """Zipf over each set, once to warm up and then `rounds` times. Raises LoadTestFailed when `larger` brought no
    adapter to the device.
    """
    sides: tuple[list[Pass], list[Pass]] = [], []
    for number in range(rounds + 1):
        for side in (0, 1) if number % 2 else (1, 0):
            before = await one.metrics()
            rate = (await one.together(_zipf((fitting, larger)[side], number), 16, 48))[0]
            sides[side].append(Pass(rate, tier_proofs.moves(before, await one.metrics())))
    for each in sides[1][1:]:
        tier_proofs.check_moved(each.moves, "a working set larger than the device's room")
    return sides[0][1:], sides[1][1:]


def _leave_page_cache(folder: Path) -> None:
    """What is read from these files next comes from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(file)


def _zipf(folders: Sequence[Path], seed: int) -> list[str]:
    picks = parse_popularity("zipf:1")(_REQUESTS, len(folders), random.Random(seed))
    return [folders[pick].name for pick in picks]


def _row_bytes() -> int:
    return pool_bytes(base_folder(), 1, bytes_per_value=2) // _MEAN_CHURN_RANK
