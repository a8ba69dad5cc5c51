"""Which adapter versions are in host memory: read in when asked for, evicted when others need the room.

Owned by the event loop: no locks. The weights stay in the engine; this module says whose. Room is taken in the books
(`host_room`) before a version is read and the engine told (`host_traffic`). Who finds no room waits in a queue
(`arrivals`); how long is bounded by `drain_rule`. Knows nothing of names, files, HTTP or devices.

Whoever calls `ensure` holds one lease on the version for the call; a version somebody holds a lease on is never evicted
or dropped. Callers still queued hold leases too, and do not use the version yet: they count for nothing.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping

from adapters.adapter_ref import AdapterVersion
from adapters.lora_model import LoRAModel
from server.errors import QueueFull, Unavailable
from server.lifecycle.arrivals import Arrival, ArrivalQueue
from server.lifecycle.drain_rule import DrainRule
from server.lifecycle.errors import AdapterNotReady, HostTierFull
from server.lifecycle.host_room import HostRoom
from server.lifecycle.host_tier_counters import HostTierCounters
from server.lifecycle.host_traffic import HostEngine, HostTraffic, ReadVersion
from server.lifecycle.pin_tasks import PinTasks


class HostTier:
    """`read` brings a version from disk. `num_leases` counts all leases on a version. `on_change` is told of a version
    that came or went, after the books are consistent, and must not call back.
    """

    def __init__(
        self,
        engine: HostEngine,
        read: ReadVersion,
        *,
        num_leases: Callable[[AdapterVersion], int],
        max_bytes: int,
        max_adapters: int | None = None,
        drain_after: float = 3.0,
        max_waiting: int = 512,
        on_change: Callable[[AdapterVersion], None] = lambda version: None,
    ) -> None:
        self.counters = HostTierCounters()
        self._num_leases = num_leases
        self._max_waiting = max_waiting
        self._room = HostRoom(max_bytes, max_adapters, is_held=self._is_held)
        self._queue = ArrivalQueue()
        self._drain = DrainRule(self._room, self._queue, after=drain_after)
        self._traffic = HostTraffic(engine, read, self._room, self.counters, on_change=on_change, on_end=self._pump)
        self._pin_tasks = PinTasks(self._load_pinned)
        self._num_waiting = 0
        self._is_closed = False

    # What requests call.

    async def ensure(
        self,
        version: AdapterVersion,
        num_bytes: int,
        *,
        timeout: float,
        beside: frozenset[AdapterVersion] = frozenset(),
        since: float | None = None,
    ) -> None:
        """The version is in host memory when this returns, at once when it is there, and stays while the caller's
        lease is open. `beside` are others that the caller needs, and has a lease on each: while it is queued they hold
        nothing. `since` is when its wait began, if not now. Raises AdapterCapacity when it never fits, QueueFull when
        too many wait, HostTierFull or AdapterNotReady after `timeout` seconds, and whatever reading it raised.
        """
        if self.is_at_hand(version):
            self.hit(version)
        else:
            self.counters.misses += 1
            await self._wait(version, num_bytes, timeout, beside, _now() if since is None else since)
            self._room.use(version)

    def is_at_hand(self, version: AdapterVersion) -> bool:
        """`ensure` would return at once."""
        return version in self._room and not (self._queue and self._drain.holds_back(version, _now()))

    def hit(self, version: AdapterVersion) -> None:  # what `ensure` counts of a version at hand
        self.counters.hits += 1
        self._room.use(version)

    def check_together(self, sizes: Mapping[AdapterVersion, int]) -> None:
        """Raises AdapterCapacity when these would not fit at one moment even if everybody left who ever may."""
        self._room.check_together(sizes)

    def released(self, version: AdapterVersion) -> None:
        """A lease on the version was given back, the last or not: somebody queued may hold another."""
        if self._queue and version in self._room and not self._is_held(version):
            self._pump()

    def used(self, version: AdapterVersion) -> None:
        """A use that `ensure` was not asked for."""
        self._room.use(version)

    async def _wait(
        self, version: AdapterVersion, num_bytes: int, timeout: float, beside: frozenset[AdapterVersion], since: float
    ) -> None:
        if self._is_closed:
            raise Unavailable("the server is shutting down")
        if self._num_waiting >= self._max_waiting:
            raise QueueFull(f"{self._num_waiting} requests wait for adapters that are not in memory; retry later")
        arrival = self._arrival(version, num_bytes, since)
        self._num_waiting += 1
        try:
            await self._end_of(arrival, timeout, beside)
        finally:
            self._num_waiting -= 1
        assert version in self._room, "a version left that somebody holds a lease on"

    def _arrival(self, version: AdapterVersion, num_bytes: int, since: float) -> Arrival:
        """The one arrival of a version that is to come; whoever gets a new one waits for its end at once."""
        arrival = self._traffic.loading(version) or self._queue.get(version)
        if arrival is None:
            self._room.check(version, num_bytes)
            arrival = Arrival(version, num_bytes, since=since)
            self._queue.add(arrival)
        elif arrival in self._queue:
            self._queue.move_up(arrival, since)
        return arrival

    async def _end_of(
        self, arrival: Arrival, timeout: float | None, beside: frozenset[AdapterVersion] = frozenset()
    ) -> None:
        began, waiter = _now(), arrival.join(beside)
        self._queue.changed()
        self._pump()  # joining may have made room too: who is queued uses nothing
        has_queued = arrival in self._queue
        try:
            async with asyncio.timeout(timeout) as limit:
                await waiter
        except TimeoutError:
            if not limit.expired():
                raise  # the read's own
            raise self._too_late(arrival, timeout) from None
        finally:
            arrival.leave(waiter)
            self._queue.changed()
            self.counters.waits += has_queued
            self.counters.wait_seconds += has_queued * (_now() - began)
            if arrival in self._queue and not arrival.num_waiting:
                self._queue.remove(arrival)
                self._pump()

    def _too_late(self, arrival: Arrival, timeout: float | None) -> AdapterNotReady:
        self.counters.timeouts += 1
        if arrival not in self._queue:
            return AdapterNotReady(f"the adapter was still being read after {timeout} seconds; retry later")
        room = self._room
        return HostTierFull(
            f"no room came free for the adapter's {arrival.num_bytes} bytes within {timeout} seconds: {len(room)} "
            f"adapters with {room.num_bytes} of cpu_lora_memory={room.max_bytes} bytes are pinned or in use; retry "
            "later, or restart with a larger --cpu-lora-memory"
        )

    # What loading and unloading of names call.

    async def put(self, model: LoRAModel) -> bool:
        """Keep a model that was just read, when room can be made without waiting; False: it stays where it was read.
        Raises AdapterCapacity when it never fits, and what the engine raises.
        """
        version, num_bytes = model.version, model.num_bytes
        if version not in self._room:
            arrival = self._traffic.loading(version)
            if arrival is None:
                self._room.check(version, num_bytes)
                if self._queue or self._is_closed:
                    return False
                if (victims := self._room.reserve(version, num_bytes, self._room.spare())) is None:
                    return False
                arrival = Arrival(version, num_bytes, since=_now(), model=model)
                self._traffic.evict(victims)
                self._traffic.start(arrival)
            await self._end_of(arrival, None)
        self._room.use(version)
        return version in self._room

    def set_policy(self, version: AdapterVersion, num_bytes: int, *, pin: bool, priority: int) -> None:
        """A pinned version is read in the background and never evicted. Raises AdapterCapacity, changing nothing, when
        what is pinned would leave too little to the others (`HostRoom.pin`).
        """
        if pin:
            others = [a for a in self._queue if a.version != version and not self._room.is_pinned(a.version)]
            self._room.pin(version, num_bytes, max((arrival.num_bytes for arrival in others), default=0))
        else:
            self._unpin(version)
        self._room.set_priority(version, priority)
        if pin and version not in self._room and version not in self._pin_tasks and not self._is_closed:
            self._pin_tasks.start(version, num_bytes)
        self._pump()

    async def drop(self, version: AdapterVersion) -> int:
        """Nobody wants the version any more: forget pin and priority, free its bytes now, and return them once they
        are free; 0 when there are none, and when somebody holds a lease on it after all.
        """
        if self._num_leases(version) > 0:
            return 0
        task = self._unpin(version)
        self._room.set_priority(version, 0)
        if task is not None:
            await asyncio.wait({task})
        await self._traffic.ended(version)
        freed = 0
        if version in self._room and not self._num_leases(version) and not self._room.is_pinned(version):
            freed = self._room.drop(version)
            self._traffic.send_away(version)
            self._pump()
        await self._traffic.until_left()
        return freed

    async def close(self) -> None:
        """End all who wait with Unavailable, and stop what is under way. What is in memory stays with the engine."""
        self._is_closed = True
        pin_tasks = self._pin_tasks.cancel_all()
        for arrival in tuple(self._queue):
            self._queue.remove(arrival)
            arrival.fail(Unavailable("the server is shutting down"))
        await self._traffic.stop()
        await asyncio.gather(*pin_tasks, return_exceptions=True)

    def _unpin(self, version: AdapterVersion) -> "asyncio.Task[None] | None":
        self._room.unpin(version)
        return self._pin_tasks.cancel(version)

    async def _load_pinned(self, version: AdapterVersion, num_bytes: int) -> None:
        if version not in self._room:
            await self._end_of(self._arrival(version, num_bytes, _now()), None)

    # Who comes and who leaves.

    def _is_held(self, version: AdapterVersion) -> bool:
        return self._num_leases(version) > self._queue.num_waiting_for(version) + self._queue.num_beside(version)

    def _pump(self) -> None:
        """Start what has room, in order. One that has none is overtaken until it is due."""
        if self._is_closed or not self._queue:
            return
        now, spare = _now(), self._room.spare()
        for arrival in tuple(self._queue):
            if arrival.version in self._room:  # it was held back
                self._queue.remove(arrival)
                arrival.succeed()
                spare = self._room.spare()
            elif (victims := self._room.reserve(arrival.version, arrival.num_bytes, spare, arrival.beside)) is not None:
                self._queue.remove(arrival)
                self._traffic.evict(victims)
                self._traffic.start(arrival)
                if any(arrival.needs):  # from now on it holds what it needs
                    spare = self._room.spare()
            elif self._drain.is_due(arrival, now):
                return

    # For the metrics and the checks.

    def __contains__(self, version: object) -> bool:
        return version in self._room

    def __iter__(self) -> Iterator[AdapterVersion]:
        return iter(self._room.residents)

    def __len__(self) -> int:
        return len(self._room)

    @property
    def num_bytes(self) -> int:
        """In memory or on their way there."""
        return self._room.num_bytes

    @property
    def num_waiting(self) -> int:
        """Callers of `ensure` that wait now."""
        return self._num_waiting

    def check_integrity(self) -> None:
        """Raises AssertionError when budget, queue and reads disagree, or somebody waits for room that is there."""
        self._room.check_integrity()
        self._queue.check_integrity()
        self._traffic.check_integrity([arrival.version for arrival in self._queue])
        assert self._num_waiting <= self._max_waiting
        first = next(iter(self._queue), None)
        if first is not None:
            assert first.version not in self._room and not self._room.fits(first.num_bytes, first.beside), (
                "nobody woke the first"
            )


def _now() -> float:
    """The loop's clock, by which it also ends waits."""
    return asyncio.get_running_loop().time()
