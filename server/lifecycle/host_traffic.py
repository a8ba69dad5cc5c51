"""Versions coming into host memory and leaving it: reads and the engine's messages, in an order that keeps the budget.

A read begins when everybody who was sent away before has left the engine: bytes are free when the engine says so, not
when it was asked. So what is in memory, what is being read and what is being unloaded never pass the limits together.
Decides neither who comes nor who leaves.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import Protocol

from adapters.adapter_ref import AdapterVersion
from adapters.lora_model import LoRAModel
from server.errors import ServerError, Unavailable
from server.lifecycle.arrivals import Arrival
from server.lifecycle.errors import HostTierFull
from server.lifecycle.host_room import HostRoom
from server.lifecycle.host_tier_counters import HostTierCounters

logger = logging.getLogger(__name__)

ReadVersion = Callable[[AdapterVersion], Awaitable[LoRAModel]]


class HostEngine(Protocol):
    """Both take their place in the engine's inbox when called, not when awaited."""

    def load_adapter(self, model: LoRAModel) -> Awaitable[None]: ...
    def unload_adapter(self, version: AdapterVersion) -> Awaitable[None]: ...


class HostTraffic:
    """`on_change` is told of a version that came or went; `on_end` is called when a load has ended, well or not."""

    def __init__(
        self,
        engine: HostEngine,
        read: ReadVersion,
        room: HostRoom,
        counters: HostTierCounters,
        *,
        on_change: Callable[[AdapterVersion], None],
        on_end: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._read = read
        self._room = room
        self._counters = counters
        self._on_change = on_change
        self._on_end = on_end
        self._loading: dict[AdapterVersion, tuple[Arrival, asyncio.Task[None]]] = {}
        self._leaving: set[asyncio.Future[None]] = set()  # unloads the engine has not done yet

    def loading(self, version: AdapterVersion) -> Arrival | None:
        """The arrival of a version that is being read."""
        found = self._loading.get(version)
        return None if found is None else found[0]

    def start(self, arrival: Arrival) -> None:
        """Read what room has been reserved for; its end is the arrival's."""
        task = asyncio.get_running_loop().create_task(self._load(arrival, tuple(self._leaving)))
        self._loading[arrival.version] = arrival, task

    async def ended(self, version: AdapterVersion) -> None:
        """The load of the version under way, if there is one, has ended, well or not."""
        if found := self._loading.get(version):
            await asyncio.wait({found[1]})

    async def stop(self) -> None:
        """Cancel all reads; whoever waits gets Unavailable."""
        tasks = [task for _, task in self._loading.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for arrival, _ in tuple(self._loading.values()):  # cancelled before their first step
            self._fail(arrival, asyncio.CancelledError())
        await self.until_left()

    def evict(self, victims: Iterable[AdapterVersion]) -> None:
        """These left the books because others need their room."""
        for victim in victims:
            self._counters.evictions += 1
            self.send_away(victim)

    def send_away(self, version: AdapterVersion) -> None:
        """Have the engine forget a version that has left the books."""
        self._forget(version)
        self._on_change(version)

    def _forget(self, version: AdapterVersion) -> None:
        try:
            leaving: asyncio.Future[None] = asyncio.ensure_future(self._engine.unload_adapter(version))
        except ServerError as error:
            leaving = asyncio.get_running_loop().create_future()
            leaving.set_exception(error)
        self._leaving.add(leaving)
        leaving.add_done_callback(lambda done: self._has_left(version, done))

    def _has_left(self, version: AdapterVersion, done: "asyncio.Future[None]") -> None:
        self._leaving.discard(done)
        if not done.cancelled() and (error := done.exception()) is not None:
            is_gone = isinstance(error, ServerError)  # the engine is, and its memory with it
            logger.log(logging.INFO if is_gone else logging.ERROR, "version %s not unloaded: %s", version[:12], error)

    async def until_left(self) -> None:
        """Everybody sent away has left, or could not."""
        if self._leaving:
            await asyncio.wait(tuple(self._leaving))

    async def _load(self, arrival: Arrival, before: "Sequence[asyncio.Future[None]]") -> None:
        clock = asyncio.get_running_loop().time
        began = clock()
        try:
            await _all_done(before)  # what could not be unloaded fails what was to have its room
            model = arrival.model or await self._read(arrival.version)
            self._fit(arrival, model)
            await self._hand_over(model)
        except BaseException as error:
            self._fail(arrival, error)
            if not isinstance(error, Exception):
                raise  # cancelled
        else:
            self._arrive(arrival, clock() - began)
        finally:
            self._on_end()

    async def _hand_over(self, model: LoRAModel) -> None:
        """What the engine did not say it has, it is told to forget: it may have it all the same."""
        loading = self._engine.load_adapter(model)
        try:
            await loading
        except BaseException:
            self._forget(model.version)
            raise

    def _fit(self, arrival: Arrival, model: LoRAModel) -> None:
        """What was read decides how many bytes it takes; whoever asked may have known another dtype's."""
        if model.version != arrival.version:
            raise RuntimeError(f"version {arrival.version} was to be read and {model.version} came")
        if (num_bytes := model.num_bytes) == arrival.num_bytes:
            return
        self._room.check(arrival.version, num_bytes)
        victims = self._room.resize(arrival.version, num_bytes)
        if victims is None:
            raise HostTierFull(
                f"the adapter takes {num_bytes} bytes and not {arrival.num_bytes}, and there is no room for the rest"
            )
        self.evict(victims)  # they leave before it is loaded: the engine keeps the order of its messages

    def _arrive(self, arrival: Arrival, seconds: float) -> None:
        del self._loading[arrival.version]
        self._room.arrive(arrival.version)
        self._counters.loads += 1
        self._counters.load_seconds += seconds
        arrival.succeed()
        self._on_change(arrival.version)

    def _fail(self, arrival: Arrival, error: BaseException) -> None:
        del self._loading[arrival.version]
        self._room.release(arrival.version)
        self._counters.failed_loads += 1
        if not isinstance(error, Exception):
            arrival.fail(Unavailable("the server is shutting down"))
        elif not arrival.fail(error):
            logger.warning("version %s, for which nobody waits any more, was not read: %s", arrival.version[:12], error)

    def check_integrity(self, queued: Collection[AdapterVersion]) -> None:
        """Raises AssertionError unless room is reserved for exactly what is being read."""
        assert self._loading.keys() == set(self._room.reserved)
        assert not self._loading.keys() & set(queued)
        assert all(not task.done() for _, task in self._loading.values()), "an ended read is still under way"


async def _all_done(unloads: "Sequence[asyncio.Future[None]]") -> None:
    """As `gather`, but whoever stops waiting cancels none of them."""
    if unloads:
        await asyncio.wait(unloads)
    for unload in unloads:
        unload.result()
