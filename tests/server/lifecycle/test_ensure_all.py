"""Several versions in memory at one moment: nobody waits for ever, nothing is lost, one timeout, capacity told."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from adapters.errors import AdapterCapacity
from server.errors import QueueFull
from server.lifecycle.errors import AdapterNotReady, HostTierFull
from tests.server.lifecycle.host_tier_world import READ, World, version_of
from tests.server.lifecycle.virtual_time import VirtualTimeLoop

SIZES = {"a": 10, "b": 10, "c": 10, "d": 10, "e": 20}


def run(test: Callable[[World], Coroutine[Any, Any, None]], max_bytes: int = 20, **options: Any) -> None:
    loop = VirtualTimeLoop()

    async def main() -> None:
        world = World(SIZES, max_bytes, **options)
        await test(world)
        await world.settle()
        assert not world.leases.total() and not world.using.total() and not world.tier.num_waiting
        await world.tier.close()

    try:
        loop.run_until_complete(main())
        assert not asyncio.all_tasks(loop)
    finally:
        loop.close()


def test_both_are_there_and_stay() -> None:
    async def test(world: World) -> None:
        await world.ask_all("ab")
        assert world.residents == "ab" and world.reads == ["a", "b"]
        with pytest.raises(HostTierFull):
            await world.ask("c", timeout=5.0)
        counters = world.tier.counters
        assert (counters.hits, counters.misses) == (0, 3)
        await world.ask_all("ba")
        assert (counters.hits, counters.misses) == (2, 3)
        world.done_all("ab")
        world.done_all("ab")
        await world.ask("c", timeout=5.0)
        world.done("c")

    run(test)


def test_what_was_evicted_while_it_waited_for_the_other_is_read_again() -> None:
    async def test(world: World) -> None:
        await world.ask("c")
        asking = asyncio.create_task(world.ask_all("ab"))
        await asyncio.sleep(0.5)
        assert world.residents == "ac"
        await world.request("d", 0.1, timeout=0.4)  # `a` is nobody's while its caller is queued for `b`
        assert "a" not in world.residents
        world.done("c")
        await asking
        assert world.residents == "ab" and world.reads.count("a") == 2
        world.done_all("ab")

    run(test)


def test_what_it_needs_stays_while_the_other_is_read() -> None:
    async def test(world: World) -> None:
        world.read_seconds[version_of("b")] = 1.0
        asking = asyncio.create_task(world.ask_all("ab"))
        await asyncio.sleep(0.5)
        with pytest.raises(HostTierFull):
            await world.ask("c", timeout=0.1)
        await asking
        assert world.reads == ["a", "b"]
        world.done_all("ab")

    run(test)


def test_two_who_take_the_room_from_each_other_both_succeed() -> None:
    async def test(world: World) -> None:
        async def request(names: str) -> None:
            await world.ask_all(names, timeout=20.0)
            await asyncio.sleep(0.1)
            world.done_all(names)

        await asyncio.gather(*(request(names) for names in ("ab", "cd", "ac", "bd")))
        async with asyncio.timeout(20.0):
            await asyncio.gather(*(request(names) for names in ("ab", "cd") * 10))

    run(test)


def test_users_of_a_part_hold_up_nobody_for_ever() -> None:
    async def test(world: World) -> None:
        """A steady stream for one adapter, so that it is never unused, and one who needs it out of the way."""

        async def stream() -> None:
            for _ in range(200):
                await world.request("c", 0.2)

        streams = [asyncio.create_task(stream()) for _ in range(3)]
        await asyncio.sleep(0.1)
        await world.ask_all("ab", timeout=30.0)
        world.done_all("ab")
        await asyncio.gather(*streams)

    run(test, drain_after=1.0)


def test_one_timeout_for_all() -> None:
    async def test(world: World) -> None:
        for name in "ab":
            world.read_seconds[version_of(name)] = 1.0
        began = asyncio.get_running_loop().time()
        with pytest.raises(AdapterNotReady, match=r"the 2 adapters of this request .* within 1\.5 seconds"):
            await world.ask_all("ab", timeout=1.5)
        assert asyncio.get_running_loop().time() == pytest.approx(began + 1.5)
        await world.ask("c")
        with pytest.raises(HostTierFull, match="within 2 seconds"):
            await world.ask_all("ab", timeout=2.0)
        world.done("c")

    run(test)


def test_waiting_behind_others_has_the_same_timeout() -> None:
    async def test(world: World) -> None:
        await world.ask("c")
        first = asyncio.create_task(world.ask_all("ab", timeout=9.0))
        await asyncio.sleep(5.0)
        with pytest.raises(AdapterNotReady, match="within 3 seconds"):
            await world.ask_all("ad", timeout=3.0)
        world.done("c")
        await first
        world.done_all("ab")

    run(test)


def test_capacity_is_told_at_once() -> None:
    async def test(world: World) -> None:
        with pytest.raises(AdapterCapacity, match="the 3 adapters take 30 bytes .* cpu_lora_memory=20"):
            await world.ask_all("abc")
        with pytest.raises(AdapterCapacity, match="the 2 adapters take 30 bytes"):
            await world.ask_all("ae")
        world.tier.set_policy(version_of("d"), 10, pin=True, priority=0)
        with pytest.raises(AdapterCapacity, match="pinned adapters hold 10"):
            await world.ask_all("ab")
        await world.ask_all("ad")
        world.done_all("ad")
        assert not set(world.reads) - {version_of("a"), version_of("d")}

    run(test)


def test_capacity_by_number() -> None:
    async def test(world: World) -> None:
        with pytest.raises(AdapterCapacity, match="3 adapters are named .* max_cpu_loras=2"):
            await world.ask_all("abc")

    run(test, max_bytes=1000, max_adapters=2)


def test_who_leaves_while_it_waits_leaves_nothing_behind() -> None:
    async def test(world: World) -> None:
        await world.ask("c")
        waiting = [asyncio.create_task(world.ask_all(names)) for names in ("ab", "bd", "ad")]
        await asyncio.sleep(1.0)
        for task in waiting:
            task.cancel()
        assert all(
            isinstance(end, asyncio.CancelledError) for end in await asyncio.gather(*waiting, return_exceptions=True)
        )
        world.check()
        assert not world.tier.num_waiting
        world.done("c")
        await world.ask_all("ab", timeout=1.0)
        world.done_all("ab")

    run(test)


def test_a_read_that_fails_fails_all_of_it() -> None:
    async def test(world: World) -> None:
        world.broken[version_of("b")] = OSError("no disk")
        with pytest.raises(OSError, match="no disk"):
            await world.ask_all("ab")
        await asyncio.sleep(2 * READ)
        assert world.residents == "a"

    run(test)


def test_too_many_who_wait() -> None:
    async def test(world: World) -> None:
        await world.ask("c")
        waiting = [asyncio.create_task(world.ask_all(names)) for names in ("ab", "ab")]
        await asyncio.sleep(0.5)
        with pytest.raises(QueueFull):
            await world.ask_all("bd")
        world.done("c")
        await asyncio.gather(*waiting)
        world.done_all("ab")
        world.done_all("ab")

    run(test, max_waiting=2)
