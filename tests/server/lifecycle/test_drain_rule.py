"""No version starves behind those that are always in use, and those not needed for it go on."""

import asyncio
import math
from collections import defaultdict

import pytest

from server.lifecycle.errors import HostTierFull
from tests.server.lifecycle.host_tier_world import READ, STEP, World, version_of
from tests.server.lifecycle.test_host_tier import SIZES, fill, soon, start
from tests.server.lifecycle.virtual_time import run

LONGEST = 2.0  # seconds a request takes at most
COLD = 2 * STEP + READ + 1e-6  # seconds: unload, read, load


class Traffic:
    """Clients that keep versions in use without a gap: before one request ends the next has begun."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.waits: dict[str, list[float]] = defaultdict(list)  # name → seconds until each was let in
        self.tasks: list[asyncio.Task[None]] = []

    def keep_using(self, name: str, until: float) -> None:
        self.tasks.append(start(self._keep_using(name, until)))

    async def request(self, name: str, seconds: float = LONGEST) -> None:
        clock = asyncio.get_running_loop().time
        began = clock()
        await self.world.ask(name)
        self.waits[name].append(clock() - began)
        await asyncio.sleep(seconds)
        self.world.done(name)

    async def _keep_using(self, name: str, until: float) -> None:
        requests = []
        while asyncio.get_running_loop().time() < until:
            requests.append(start(self.request(name)))
            await asyncio.sleep(LONGEST / 4)
        await asyncio.gather(*requests)


def test_one_who_has_waited_long_gets_room_within_the_longest_request() -> None:
    async def main() -> None:
        world = World(SIZES, 10, drain_after=3.0)
        traffic = Traffic(world)
        traffic.keep_using("a", until=20.0)
        await asyncio.sleep(1.0)
        await traffic.request("b")
        await asyncio.gather(*traffic.tasks)
        assert 3.0 <= traffic.waits["b"][0] <= 3.0 + LONGEST + COLD
        assert max(traffic.waits["a"]) <= LONGEST + LONGEST + 2 * COLD, "for b's sake, who goes at once when done"

    run(main())


def test_without_the_rule_it_starves() -> None:
    async def main() -> None:
        world = World(SIZES, 10, drain_after=math.inf)
        traffic = Traffic(world)
        traffic.keep_using("a", until=60.0)
        await asyncio.sleep(1.0)
        with pytest.raises(HostTierFull):
            await world.ask("b", timeout=50.0)
        await asyncio.gather(*traffic.tasks)

    run(main())


def test_those_whose_room_is_not_needed_go_on() -> None:
    async def main() -> None:
        world = World(SIZES, 30, drain_after=3.0)
        traffic = Traffic(world)
        for _ in range(8):
            await fill(world, "abbcc")  # a is worth least
        for name in "abc":
            traffic.keep_using(name, until=20.0)
        await asyncio.sleep(1.0)
        await traffic.request("d")
        await asyncio.gather(*traffic.tasks)
        assert traffic.waits["d"][0] <= 3.0 + LONGEST + COLD
        assert max(traffic.waits["b"] + traffic.waits["c"]) == 0
        assert max(traffic.waits["a"]) > 0

    run(main())


def test_a_large_one_is_not_starved_by_small_ones() -> None:
    """Small ones overtake it while it is young, and none does once it is due."""

    async def main() -> None:
        world = World(SIZES | {"h": 40}, 40, drain_after=3.0)
        traffic = Traffic(world)
        for name in "abcdefg":
            traffic.keep_using(name, until=30.0)
        await asyncio.sleep(1.0)
        await traffic.request("h")
        await asyncio.gather(*traffic.tasks)
        assert traffic.waits["h"][0] <= 3.0 + 2 * LONGEST + 2 * COLD, "four before it were waiting already"

    run(main())


def test_a_small_one_overtakes_until_the_first_is_due() -> None:
    async def main() -> None:
        world = World(SIZES | {"h": 20}, 30, drain_after=3.0)
        await world.ask("a")
        await world.ask("b")
        large = start(world.request("h"))
        await asyncio.sleep(1.0)
        await world.request("c")
        assert world.residents == "abc"
        await asyncio.sleep(3.0)
        late = start(world.request("d"))
        await asyncio.sleep(1.0)
        assert world.tier.num_waiting == 2, "d does not take c's room before h"
        world.done("a")
        await asyncio.gather(large, late)

    run(main())


def test_many_who_wait_get_their_turns() -> None:
    """Twelve versions always in use, room for three: nobody waits much longer than those before it take."""

    async def main() -> None:
        names = "abcdefghijkl"
        world = World(dict.fromkeys(names, 10), 30, drain_after=3.0)
        traffic = Traffic(world)
        for name in names:
            traffic.keep_using(name, until=60.0)
        await asyncio.gather(*traffic.tasks)
        rounds = math.ceil(len(names) / 3)
        assert max(max(waits) for waits in traffic.waits.values()) <= rounds * (3.0 + LONGEST + 2 * COLD)
        await world.settle()

    run(main())


def test_pinned_ones_are_never_held_back() -> None:
    async def main() -> None:
        world = World(SIZES, 20, drain_after=3.0)
        world.tier.set_policy(version_of("a"), 10, pin=True, priority=0)
        await world.settle()
        traffic = Traffic(world)
        traffic.keep_using("a", until=20.0)
        traffic.keep_using("b", until=20.0)
        await asyncio.sleep(1.0)
        await traffic.request("c")
        await asyncio.gather(*traffic.tasks)
        assert max(traffic.waits["a"]) == 0
        assert traffic.waits["c"][0] <= 3.0 + LONGEST + COLD

    run(main())


def test_who_is_held_back_is_let_in_when_the_wait_is_over() -> None:
    """The first gives up: its room is not needed any more."""

    async def main() -> None:
        world = World(SIZES, 10, drain_after=3.0)
        await world.ask("a")
        waiting = start(world.ask("b", timeout=5.0))
        await asyncio.sleep(4.0)
        again = start(world.ask("a"))
        await soon()
        assert not again.done()
        await asyncio.sleep(2.0)
        assert isinstance(waiting.exception(), HostTierFull)
        assert again.done() and world.reads == [version_of("a")]
        world.check()

    run(main())


def test_the_last_to_join_a_queue_may_be_what_the_first_waited_for() -> None:
    """Leases taken before the wait was due, by clients who ask after it: queued, they use nothing any more."""

    async def main() -> None:
        world, a = World(SIZES, 10, drain_after=3.0), version_of("a")
        await world.ask("a")
        waiting = start(world.request("b"))
        await asyncio.sleep(4.0)
        world.leases[a] += 2
        world.done("a")
        queued = [start(world.tier.ensure(a, 10, timeout=50.0)) for _ in range(2)]
        await world.settle()
        assert waiting.done() and world.reads == [a, version_of("b"), a]
        await asyncio.gather(*queued)

    run(main())


def test_who_was_just_let_in_does_not_leave_for_the_next_in_the_queue() -> None:
    async def main() -> None:
        world = World(SIZES | {"g": 20, "h": 20}, 20, drain_after=3.0)
        await fill(world, "a")
        await world.ask("b")
        gives_up = start(world.ask("g", timeout=4.5))
        await asyncio.sleep(2.0)
        large = start(world.request("h"))
        await asyncio.sleep(2.0)
        again, late = start(world.request("a", 1.0)), start(world.request("c"))
        await asyncio.sleep(1.0)
        assert isinstance(gives_up.exception(), HostTierFull)
        assert world.using[version_of("a")] == 1 and not late.done()
        world.done("b")
        await asyncio.gather(large, again, late)

    run(main())


def test_whose_room_was_needed_once_is_not_held_back_for_ever() -> None:
    async def main() -> None:
        world = World(SIZES, 20, drain_after=3.0)
        await fill(world, "abb")
        await world.ask("a")
        await world.ask("b")
        gives_up = start(world.ask("d", timeout=4.0))
        await asyncio.sleep(3.5)
        held_back = start(world.request("a"))
        await asyncio.sleep(1.0)
        assert held_back.done() and isinstance(gives_up.exception(), HostTierFull)
        waiting = start(world.request("e"))
        await soon()
        for _ in range(5):
            await world.request("a")  # now worth more than b
        await asyncio.sleep(3.5)
        again, queued = start(world.request("a")), start(world.request("b"))
        await soon()
        assert again.done() and not queued.done()
        world.done("b")
        await asyncio.gather(waiting, queued)

    run(main())
