"""Random lives of a host tier against a simple model, in virtual time.

The model is what clients see: requests that wait, requests let in, pins, and what the fake engine and disk hold. World
and Engine assert at every message that the budget holds and nobody in use is unloaded.
"""

import asyncio
from dataclasses import dataclass
from functools import partial

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from adapters.adapter_ref import AdapterVersion
from adapters.errors import AdapterCapacity
from server.errors import QueueFull
from server.lifecycle.errors import AdapterNotReady
from tests.server.lifecycle.host_tier_world import World, model_of, version_of
from tests.server.lifecycle.virtual_time import VirtualTimeLoop

SIZES = {"a": 10, "b": 10, "c": 10, "d": 20, "e": 20, "f": 5, "g": 45}
MAX_BYTES, MAX_ADAPTERS, MAX_WAITING, DRAIN_AFTER = 50, 4, 6, 1.0
LATE = 1e-6  # seconds

names = st.sampled_from(sorted(SIZES))
timeouts = st.sampled_from([0.0, 0.05, 2.0, 30.0])
waits = st.sampled_from([0.0, 0.005, 0.01, 0.02, 0.03, 0.1, 1.5, 10.0])
DISK_FULL = OSError("input/output error")


@dataclass
class Request:
    """`num_ends` counts how often it was answered, let in or not."""

    names: str  # of one letter each: what it needs at one moment
    deadline: float
    num_ends: int = 0
    is_let_in: bool = False
    task: "asyncio.Task[None] | None" = None


class HostTierMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = VirtualTimeLoop()
        self.waiting: list[Request] = []
        self.let_in: list[Request] = []
        self.pins: set[AdapterVersion] = set()
        self.tasks: list[asyncio.Task[None]] = []  # of all clients
        self.world = World(SIZES, MAX_BYTES, MAX_ADAPTERS, max_waiting=MAX_WAITING, drain_after=DRAIN_AFTER)

    def sleep(self, seconds: float) -> None:
        self.loop.run_until_complete(asyncio.sleep(seconds))

    # Clients.

    @rule(names=st.sets(names, min_size=1, max_size=3), timeout=timeouts)
    def ask(self, names: set[str], timeout: float) -> None:
        request = Request("".join(sorted(names)), self.loop.time() + timeout)
        request.task = self.loop.create_task(self._request(request, timeout))
        self.tasks.append(request.task)
        self.waiting.append(request)
        self.sleep(0)

    async def _request(self, request: Request, timeout: float) -> None:
        was_full = self.world.tier.num_waiting >= MAX_WAITING
        try:
            await self.world.ask_all(request.names, timeout=timeout)
        except AdapterNotReady:
            assert self.loop.time() >= request.deadline - LATE
        except QueueFull:
            assert was_full or len(request.names) > 1  # it asks again for each
        except AdapterCapacity:
            together = sum(SIZES[name] for name in request.names)
            assert self.pins or together > MAX_BYTES, "everything fits when nothing is pinned"
        except OSError as error:
            assert error is DISK_FULL
        else:
            request.is_let_in = True
            self.let_in.append(request)
        finally:
            request.num_ends += 1
            self.waiting.remove(request)

    @precondition(lambda self: self.let_in)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.let_in))
        self.let_in.remove(request)
        self.loop.call_soon(partial(self.world.done_all, request.names))
        self.sleep(0)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), at_once=st.booleans())
    def cancel(self, data: st.DataObject, at_once: bool) -> None:
        """One who is let in at the same moment may find out first."""
        request = data.draw(st.sampled_from(self.waiting))
        assert request.task is not None
        request.task.cancel()
        if not at_once:
            self.sleep(0)

    # The service.

    @rule(name=names)
    def put(self, name: str) -> None:
        self.tasks.append(self.loop.create_task(self._put(version_of(name), SIZES[name])))
        self.sleep(0)

    async def _put(self, version: AdapterVersion, num_bytes: int) -> None:
        try:
            await self.world.tier.put(model_of(version, num_bytes))
        except AdapterCapacity:
            assert self.pins
        except OSError as error:  # of a read it joined
            assert error is DISK_FULL

    @rule(name=names)
    def drop(self, name: str) -> None:
        self.tasks.append(self.loop.create_task(self._drop(version_of(name))))
        self.sleep(0)

    async def _drop(self, version: AdapterVersion) -> None:
        if not self.world.leases[version]:
            self.pins.discard(version)
        freed = await self.world.tier.drop(version)
        assert freed in (0, self.world.sizes[version])

    @rule(name=names, is_pin=st.booleans(), priority=st.integers(-1, 1))
    def set_policy(self, name: str, is_pin: bool, priority: int) -> None:
        self.loop.run_until_complete(self._set_policy(version_of(name), is_pin, priority))

    async def _set_policy(self, version: AdapterVersion, is_pin: bool, priority: int) -> None:
        try:
            self.world.tier.set_policy(version, self.world.sizes[version], pin=is_pin, priority=priority)
        except AdapterCapacity:
            assert is_pin and version not in self.pins
        else:
            self.pins = self.pins | {version} if is_pin else self.pins - {version}

    # The disk and the clock.

    @rule(name=names, is_broken=st.booleans())
    def break_disk(self, name: str, is_broken: bool) -> None:
        if is_broken:
            self.world.broken[version_of(name)] = DISK_FULL
        else:
            self.world.broken.pop(version_of(name), None)

    @rule(seconds=waits)
    def time_passes(self, seconds: float) -> None:
        self.sleep(seconds)

    # What always holds.

    @invariant()
    def books_are_sound(self) -> None:
        self.world.check()

    @invariant()
    def nobody_waits_beyond_the_deadline(self) -> None:
        assert all(self.loop.time() <= request.deadline + LATE for request in self.waiting)
        assert all(request.num_ends == 1 for request in self.let_in)
        assert all(version_of(name) in self.world.tier for request in self.let_in for name in request.names)

    @invariant()
    def pins_leave_room(self) -> None:
        assert sum(self.world.sizes[version] for version in self.pins) < MAX_BYTES
        assert len(self.pins) < MAX_ADAPTERS

    @invariant()
    def who_is_let_in_is_counted(self) -> None:
        num_used = sum(len(request.names) for request in self.let_in)
        assert sum(self.world.using.values()) == num_used
        assert sum(self.world.leases.values()) <= num_used + sum(len(request.names) for request in self.waiting)

    def teardown(self) -> None:
        try:
            self.loop.run_until_complete(self._end())
            assert not asyncio.all_tasks(self.loop)
        finally:
            self.loop.close()

    async def _end(self) -> None:
        """All go home: everybody has been answered once, the pinned are there, and dropping the rest leaves nothing."""
        self.world.broken.clear()
        while self.waiting or self.let_in:
            for request in tuple(self.let_in):
                self.let_in.remove(request)
                self.world.done_all(request.names)
            await asyncio.sleep(0.5)
            self.nobody_waits_beyond_the_deadline()
        ends = await asyncio.gather(*self.tasks, return_exceptions=True)
        assert [end for end in ends if end is not None and not isinstance(end, asyncio.CancelledError)] == []
        await self.world.settle()
        tier, host = self.world.tier, self.world.engine.host
        assert set(host) == {version for version in self.world.sizes if version in tier}
        assert host.num_bytes == tier.num_bytes
        assert tier.num_waiting == 0 and not self.world.reading
        pinned_bytes = sum(self.world.sizes[version] for version in self.pins & set(host))
        freed = [await tier.drop(version) for version in self.world.sizes]
        assert sum(freed) >= pinned_bytes
        assert (host.num_bytes, tier.num_bytes, len(host), len(tier)) == (0, 0, 0, 0)
        tier.check_integrity()


HostTierMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestHostTier = HostTierMachine.TestCase
