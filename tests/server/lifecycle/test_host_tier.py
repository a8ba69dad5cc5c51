"""What `ensure`, `put`, `drop` and pins promise, on a fake engine and in virtual time."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from adapters.errors import AdapterCapacity
from server.errors import QueueFull, ServerError, Unavailable
from server.lifecycle.errors import AdapterNotReady, HostTierFull
from tests.server.lifecycle.host_tier_world import READ, STEP, World, model_of, version_of
from tests.server.lifecycle.test_lfu_with_ageing import lru_hit_rate, zipf
from tests.server.lifecycle.virtual_time import run

A, B, C = map(version_of, "abc")
SIZES = dict.fromkeys("abcdefgh", 10)


def start(coroutine: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
    return asyncio.get_running_loop().create_task(coroutine)


async def fill(world: World, names: str) -> None:
    """One after the other, used once, none in use afterwards."""
    for name in names:
        await world.request(name)


async def soon() -> None:
    """Whatever was started has come to where it waits for time to pass."""
    for _ in range(10):
        await asyncio.sleep(0)


def test_a_resident_is_let_in_without_yielding() -> None:
    async def main() -> None:
        world = World(SIZES, 20)
        await fill(world, "a")
        with pytest.raises(StopIteration):  # ran to its end
            world.tier.ensure(A, 10, timeout=1).send(None)
        assert (world.tier.counters.hits, world.tier.counters.misses) == (1, 1)
        assert world.reads == [A]

    run(main())


def test_racers_share_one_read_and_one_load() -> None:
    async def main() -> None:
        world = World(SIZES, 20)
        await asyncio.gather(*(world.request("a", 0.1) for _ in range(64)))
        assert world.reads == [A]
        assert world.engine.asked == [("load", A)]
        assert (world.tier.counters.misses, world.tier.counters.loads) == (64, 1)
        assert world.tier.counters.load_seconds == pytest.approx(READ + STEP)
        assert world.changes == [A]
        world.check()

    run(main())


def test_a_failed_read_fails_all_alike_and_leaves_nothing() -> None:
    async def main() -> None:
        world = World(SIZES, 20)
        world.broken[A] = OSError("input/output error")
        ends = await asyncio.gather(*(world.request("a") for _ in range(64)), return_exceptions=True)
        assert ends == [world.broken[A]] * 64
        assert (world.tier.num_bytes, world.tier.num_waiting, world.engine.asked) == (0, 0, [])
        assert (world.tier.counters.failed_loads, world.tier.counters.loads) == (1, 0)
        world.check()
        del world.broken[A]
        await world.request("a")
        assert world.residents == "a"

    run(main())


def test_a_read_that_times_out_itself_is_no_late_adapter() -> None:
    async def main() -> None:
        world = World(SIZES, 20)
        world.broken[A] = TimeoutError("the disk")
        with pytest.raises(TimeoutError, match="the disk"):
            await world.request("a")

    run(main())


def test_who_is_cancelled_does_not_cancel_the_others_read() -> None:
    async def main() -> None:
        world = World(SIZES, 20)
        requests = [start(world.request("a", 1.0)) for _ in range(3)]
        await asyncio.sleep(READ / 2)
        requests[0].cancel()
        await asyncio.wait(requests)
        assert [request.cancelled() for request in requests] == [True, False, False]
        assert world.reads == [A]
        assert world.tier.num_waiting == 0

    run(main())


def test_a_read_nobody_waits_for_any_more_is_kept_and_counts_no_use() -> None:
    async def main() -> None:
        world = World(SIZES, 20)
        request = start(world.request("a"))
        await asyncio.sleep(READ / 2)
        request.cancel()
        await world.settle()
        assert world.residents == "a"
        await fill(world, "bc")
        assert world.residents == "bc", "a was never used"

    run(main())


def test_who_gives_up_in_the_queue_makes_way() -> None:
    async def main() -> None:
        world = World(SIZES, 10)
        await world.ask("a")
        gives_up, waits = start(world.request("b")), start(world.request("c"))
        await asyncio.sleep(0.1)
        gives_up.cancel()
        await asyncio.sleep(0.1)
        world.done("a")
        await waits
        assert world.reads == [A, C]
        world.check()

    run(main())


@pytest.mark.parametrize(("max_bytes", "max_adapters"), [(35, None), (1000, 3)])
def test_the_budget_holds_for_reads_under_way_and_unloads_too(max_bytes: int, max_adapters: int | None) -> None:
    """World and the fake engine's cache raise when it does not."""

    async def main() -> None:
        world = World(SIZES, max_bytes, max_adapters)
        requests = (world.request(name, seconds) for seconds in (0.0, 0.3, 0.05) for name in "abcdefgh")
        await asyncio.gather(*requests)
        assert len(world.tier) == 3
        await world.settle()
        assert set(world.engine.host) == {version_of(name) for name in world.residents}

    run(main())


def test_the_victim_is_unloaded_before_the_new_one_is_read_and_loaded() -> None:
    async def main() -> None:
        world = World(SIZES, 10)
        await fill(world, "a")
        request = start(world.request("b"))
        await soon()
        assert world.engine.asked == [("load", A), ("unload", A)]
        assert world.reads == [A], "its bytes are not free yet"
        await request
        assert world.engine.asked == [("load", A), ("unload", A), ("load", B)]
        assert world.changes == [A, A, B]
        assert world.tier.counters.evictions == 1

    run(main())


def test_a_version_comes_back_while_it_is_being_unloaded() -> None:
    async def main() -> None:
        world = World(SIZES, 10)
        await fill(world, "a")
        dropped, back = start(world.tier.drop(A)), start(world.request("a"))
        assert await dropped == 10
        await back
        assert world.engine.asked == [("load", A), ("unload", A), ("load", A)]
        await world.settle()
        assert A in world.engine.host

    run(main())


def test_only_those_nobody_uses_leave_lowest_priority_first() -> None:
    async def main() -> None:
        world = World(SIZES, 30)
        await fill(world, "abbbcc")
        world.tier.set_policy(A, 10, pin=False, priority=1)
        await world.request("d")
        assert world.residents == "abd", "c is worth less than b, and a is of a higher priority"
        await world.ask("d")
        await world.request("e")
        assert world.residents == "ade"

    run(main())


def test_no_more_leave_than_the_room_needs() -> None:
    async def main() -> None:
        world = World({"a": 10, "b": 10, "c": 80, "d": 80}, 100)
        await fill(world, "abcc")
        await world.request("d")
        assert world.residents == "abd", "with the large one gone the small ones need not leave"

    run(main())


def test_waiters_get_room_in_the_order_they_came() -> None:
    async def main() -> None:
        world, order = World(SIZES, 10), []

        async def client(name: str) -> None:
            await world.ask(name)
            order.append(name)
            await asyncio.sleep(0.5)
            world.done(name)

        await world.ask("a")
        clients = [start(client(name)) for name in "bcdbe"]
        await asyncio.sleep(0.1)
        assert world.tier.num_waiting == 5
        world.done("a")
        await asyncio.gather(*clients)
        assert order == ["b", "b", "c", "d", "e"], "the second b comes with the first"
        assert world.tier.counters.waits == 5
        assert world.tier.counters.wait_seconds > 5 * 0.1

    run(main())


def test_the_number_of_waiters_is_bounded() -> None:
    async def main() -> None:
        world = World(SIZES, 10, max_waiting=2)
        await world.ask("a")
        waiting = [start(world.request(name)) for name in "bc"]
        await soon()
        with pytest.raises(QueueFull, match="2 requests wait"):
            await world.ask("b")
        await world.request("a")  # those in memory are not asked to queue
        world.done("a")
        await asyncio.gather(*waiting)

    run(main())


def test_waiting_ends_in_time_and_says_when_to_come_back() -> None:
    async def main() -> None:
        world = World(SIZES, 10)
        await world.ask("a")
        with pytest.raises(HostTierFull, match="1 adapters with 10 of cpu_lora_memory=10.*--cpu-lora-memory") as caught:
            await world.ask("b", timeout=2.0)
        assert asyncio.get_running_loop().time() == pytest.approx(2.0 + READ + STEP)
        error: ServerError = caught.value
        assert (error.status, error.code) == (503, "adapter_not_ready")
        assert error.retry_after
        assert (world.tier.num_waiting, world.reads, world.tier.counters.timeouts) == (0, [A], 1)
        world.done("a")
        await world.request("b")

    run(main())


def test_a_slow_read_ends_the_wait_and_goes_on() -> None:
    async def main() -> None:
        world = World(SIZES, 10)
        world.read_seconds[A] = 5.0
        with pytest.raises(AdapterNotReady, match="still being read after 1") as caught:
            await world.ask("a", timeout=1.0)
        assert not isinstance(caught.value, HostTierFull)
        await world.request("a", timeout=10.0)
        assert world.reads == [A]

    run(main())


def test_what_never_fits_is_refused_at_once() -> None:
    async def main() -> None:
        world = World({"a": 10, "b": 31}, 30)
        with pytest.raises(AdapterCapacity, match="31 bytes.*cpu_lora_memory=30.*--cpu-lora-memory"):
            await world.ask("b")
        with pytest.raises(AdapterCapacity, match="31 bytes"):
            await world.tier.put(model_of(B, 31))
        assert asyncio.get_running_loop().time() == 0
        world.check()

    run(main())


def test_the_bytes_that_count_are_those_read() -> None:
    """Another dtype's, say."""

    async def main() -> None:
        world = World({"a": 10, "b": 20, "c": 40}, 30)
        world.declared |= {B: 10, C: 10, A: 20}
        await world.request("a")
        assert world.tier.num_bytes == 10
        await world.request("b")
        assert (world.tier.num_bytes, world.residents) == (30, "ab")

    run(main())


def test_others_leave_for_bytes_that_were_not_declared() -> None:
    async def main() -> None:
        world = World({"a": 10, "b": 20, "c": 10}, 30)
        world.declared[B] = 10
        world.check_memory = lambda: None  # type: ignore[method-assign]  # nobody could know before reading
        await fill(world, "aac")
        await world.request("b")
        await world.settle()
        assert world.residents == "ab" and world.engine.host.num_bytes == 30

    run(main())


@pytest.mark.parametrize(("size", "error"), [(40, AdapterCapacity), (25, HostTierFull)])
def test_more_bytes_than_were_declared_may_not_fit(size: int, error: type[Exception]) -> None:
    async def main() -> None:
        world = World({"a": 10, "b": size}, 30)
        world.declared[B] = 10
        world.check_memory = lambda: None  # type: ignore[method-assign]  # nobody could know before reading
        await world.ask("a")
        with pytest.raises(error, match=f"{size} bytes"):
            await world.ask("b")
        assert (world.tier.num_bytes, world.residents) == (10, "a")

    run(main())


def test_what_was_just_read_is_kept_when_room_can_be_made_at_once() -> None:
    async def main() -> None:
        world = World(SIZES, 20)
        await fill(world, "aa")
        assert await world.tier.put(model_of(B, 10))
        assert await world.tier.put(model_of(B, 10))
        assert world.residents == "ab"
        assert await world.tier.put(model_of(C, 10))
        assert world.residents == "ac"
        await world.ask("a")
        await world.ask("c")
        assert not await world.tier.put(model_of(B, 10))
        waiting = start(world.request("d"))
        await soon()
        world.done("c")
        assert not await world.tier.put(model_of(C, 10)), "others came first"
        await waiting
        assert world.reads == [A, version_of("d")]

    run(main())


def test_what_was_just_read_does_not_overtake_who_waits() -> None:
    async def main() -> None:
        world = World(SIZES | {"h": 30}, 30)
        await fill(world, "b")
        await world.ask("a")
        waiting = start(world.request("h"))
        await soon()
        assert not await world.tier.put(model_of(C, 10))
        world.done("a")
        await waiting

    run(main())


def test_put_joins_a_read_and_readers_join_a_put() -> None:
    async def main() -> None:
        world = World(SIZES, 20)
        request, put = start(world.request("a")), start(world.tier.put(model_of(A, 10)))
        assert await put
        await request
        put, request = start(world.tier.put(model_of(B, 10))), start(world.request("b"))
        assert await put
        await request
        assert world.engine.asked == [("load", A), ("load", B)]
        assert world.reads == [A]

    run(main())


def test_what_the_engine_refuses_is_the_error_of_all() -> None:
    async def main() -> None:
        world = World(SIZES, 20)
        world.engine.refuse = AdapterCapacity("rank 4096")
        ends = await asyncio.gather(world.request("a"), world.tier.put(model_of(A, 10)), return_exceptions=True)
        assert ends == [world.engine.refuse] * 2
        assert world.tier.num_bytes == 0
        world.check()

    run(main())


def test_drop_frees_now_and_says_how_much() -> None:
    async def main() -> None:
        world = World(SIZES, 20)
        await fill(world, "a")
        assert await world.tier.drop(A) == 10
        assert (world.engine.host.num_bytes, world.tier.num_bytes, world.residents) == (0, 0, "")
        assert await world.tier.drop(A) == 0
        assert world.tier.counters.evictions == 0
        await world.ask("b")
        assert await world.tier.drop(B) == 0, "somebody uses it"
        assert world.residents == "b"

    run(main())


def test_drop_waits_for_a_read_under_way() -> None:
    async def main() -> None:
        world = World(SIZES, 20)
        request = start(world.request("a"))
        await asyncio.sleep(READ / 2)
        request.cancel()
        await soon()
        assert await world.tier.drop(A) == 10
        assert world.engine.host.num_bytes == 0

    run(main())


@pytest.mark.parametrize("is_pin", [False, True])
def test_drop_thinks_again_when_the_version_is_wanted_after_all(is_pin: bool) -> None:
    async def main() -> None:
        world = World(SIZES, 20)
        request = start(world.request("a"))
        await asyncio.sleep(READ / 2)
        request.cancel()
        await soon()
        drop = start(world.tier.drop(A))
        await soon()
        if is_pin:
            world.tier.set_policy(A, 10, pin=True, priority=0)
        else:
            request = start(world.request("a", 1.0))
        assert await drop == 0
        await world.settle()
        assert world.residents == "a" and world.reads == [A]

    run(main())


def test_a_pin_that_waited_for_room_is_gone_when_drop_returns() -> None:
    async def main() -> None:
        world = World(SIZES, 20)
        await world.ask("a")
        await world.ask("b")
        world.tier.set_policy(C, 10, pin=True, priority=0)
        await world.settle()
        assert await world.tier.drop(C) == 0
        world.done("a")
        await world.settle()
        assert world.reads == [A, B]

    run(main())


def test_drop_makes_room_for_who_waits() -> None:
    async def main() -> None:
        world = World(SIZES, 20)
        world.tier.set_policy(A, 10, pin=True, priority=0)
        await world.settle()
        await world.ask("b")
        waiting = start(world.request("c"))
        await soon()
        assert await world.tier.drop(A) == 10
        await waiting

    run(main())


def test_a_pinned_version_is_read_and_stays() -> None:
    async def main() -> None:
        world = World(SIZES, 20)
        world.tier.set_policy(A, 10, pin=True, priority=0)
        await world.settle()
        assert world.residents == "a"
        await fill(world, "bcbc")
        assert world.residents == "ac"
        assert world.reads.count(A) == 1
        world.tier.set_policy(A, 10, pin=False, priority=0)
        await fill(world, "bcbc")
        assert world.residents == "bc"

    run(main())


def test_a_pinned_version_waits_for_room_as_others_do() -> None:
    async def main() -> None:
        world = World(SIZES, 20)
        await world.ask("a")
        await world.ask("b")
        world.tier.set_policy(C, 10, pin=True, priority=0)
        await world.settle()
        assert world.residents == "ab"
        world.done("a")
        await world.settle()
        assert world.residents == "bc"

    run(main())


def test_a_pin_taken_back_in_time_reads_nothing() -> None:
    async def main() -> None:
        world = World(SIZES, 20)
        world.tier.set_policy(A, 10, pin=True, priority=0)
        world.tier.set_policy(A, 10, pin=False, priority=0)
        world.tier.set_policy(B, 10, pin=True, priority=0)
        world.tier.set_policy(B, 10, pin=False, priority=0)
        world.tier.set_policy(B, 10, pin=True, priority=0)
        await world.settle()
        assert world.residents == "b"
        world.tier.set_policy(C, 10, pin=False, priority=0)
        assert await world.tier.drop(B) == 10

    run(main())


def test_a_pin_taken_back_twice_reads_nothing() -> None:
    async def main() -> None:
        world = World(SIZES, 20)
        await world.ask("a")
        await world.ask("b")
        for is_pin in (True, False, True):
            world.tier.set_policy(C, 10, pin=is_pin, priority=0)
        await world.settle()
        world.tier.set_policy(C, 10, pin=False, priority=0)
        await soon()
        world.done("a")
        await world.settle()
        assert world.reads == [A, B]

    run(main())


def test_a_pin_taken_back_makes_room_for_who_waits() -> None:
    async def main() -> None:
        world = World(SIZES, 20)
        world.tier.set_policy(A, 10, pin=True, priority=0)
        await world.settle()
        await world.ask("b")
        waiting = start(world.request("c"))
        await soon()
        world.tier.set_policy(A, 10, pin=False, priority=0)
        await waiting
        assert world.residents == "bc"

    run(main())


def test_a_pinned_version_that_cannot_be_read_is_tried_again_when_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        world = World(SIZES, 20)
        world.broken[A] = OSError("input/output error")
        world.tier.set_policy(A, 10, pin=True, priority=0)
        await world.settle()
        assert "input/output error" in caplog.text
        world.broken.clear()
        await world.request("a")
        await fill(world, "bc")
        assert world.residents == "ac"

    run(main())


def test_pins_leave_room_for_the_largest_of_the_others() -> None:
    async def main() -> None:
        world = World({"a": 10, "b": 15, "c": 10, "d": 20}, 35)
        await fill(world, "b")
        world.tier.set_policy(A, 10, pin=True, priority=0)
        world.tier.set_policy(A, 10, pin=True, priority=5)
        with pytest.raises(AdapterCapacity, match="leave 14 of cpu_lora_memory=35.*largest takes 15"):
            world.tier.set_policy(C, 11, pin=True, priority=0)
        world.tier.set_policy(C, 10, pin=True, priority=0)
        with pytest.raises(AdapterCapacity, match="20 bytes.*pinned adapters hold 20 of cpu_lora_memory=35.*unpin"):
            await world.ask("d")
        await world.settle()
        assert world.residents == "abc"

    run(main())


def test_pins_leave_room_for_who_waits_and_one_place() -> None:
    async def main() -> None:
        world = World(SIZES | {"h": 20}, 30)
        await world.ask("a")
        await world.ask("b")
        waiting = start(world.request("h"))
        await soon()
        with pytest.raises(AdapterCapacity, match="leave 15.*takes 20"):
            world.tier.set_policy(A, 15, pin=True, priority=0)
        world.done("a")
        await waiting
        counted = World(SIZES, 1000, 2)
        counted.tier.set_policy(A, 10, pin=True, priority=0)
        with pytest.raises(AdapterCapacity, match="1 of max_cpu_loras=2"):
            counted.tier.set_policy(B, 10, pin=True, priority=0)
        everything = World(SIZES, 10)
        with pytest.raises(AdapterCapacity, match="leave 0 of"):
            everything.tier.set_policy(A, 10, pin=True, priority=0)
        await world.settle()
        await counted.tier.close()

    run(main())


def test_a_dead_engine_fails_who_waits() -> None:
    async def main() -> None:
        world = World(SIZES, 10)
        await fill(world, "a")
        world.engine.dead = Unavailable("the engine died")
        with pytest.raises(Unavailable, match="died"):
            await world.request("b")
        assert await world.tier.drop(A) == 0, "it left with the engine"
        world.tier.check_integrity()

    run(main())


def test_closing_ends_everybody() -> None:
    async def main() -> None:
        world = World(SIZES, 20)
        await world.ask("a")
        world.tier.set_policy(B, 10, pin=True, priority=0)
        requests = [start(world.request(name)) for name in "bcd"]
        await asyncio.sleep(READ / 2)
        requests.append(start(world.request("a")))
        requests.append(start(world.tier.put(model_of(version_of("e"), 10))))
        await world.tier.close()
        ends = await asyncio.gather(*requests, return_exceptions=True)
        assert [isinstance(end, Unavailable) for end in ends] == [True, True, True, False, False]
        with pytest.raises(Unavailable, match="shutting down"):
            await world.ask("c")
        world.tier.check_integrity()
        assert (world.tier.num_bytes, world.tier.num_waiting) == (10, 0)

    run(main())


def test_closing_ends_reads_that_have_not_begun() -> None:
    async def main() -> None:
        world = World(SIZES, 20)
        world.tier.set_policy(A, 10, pin=True, priority=0)
        request = world.tier.ensure(B, 10, timeout=1)
        waiter = request.send(None)
        await world.tier.close()
        assert waiter is not None and world.tier.num_bytes == 0
        with pytest.raises(Unavailable):
            request.throw(Unavailable("as the waiter says"))

    run(main())


@pytest.mark.parametrize("room", [4, 8])
def test_a_scan_of_one_more_than_fits_still_hits(room: int) -> None:
    async def main() -> None:
        world = World(dict.fromkeys("abcdefghi"[: room + 1], 10), room * 10)
        for _ in range(20):
            await fill(world, "abcdefghi"[: room + 1])
        assert world.tier.counters.hits > 0.5 * 20 * (room + 1)

    run(main())


@pytest.mark.parametrize("seed", range(3))
def test_zipf_with_room_for_half_hits_better_than_lru(seed: int) -> None:
    async def main() -> None:
        world = World({str(item): 10 for item in range(24)}, 120)
        stream = zipf(24, 2_000, seed)
        for item in stream:
            await world.request(str(item))
        assert world.tier.counters.hits / len(stream) > lru_hit_rate(stream, 12) + 0.03

    run(main())
