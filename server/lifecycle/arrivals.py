"""Versions on their way into host memory, each with everybody who waits for it, and the queue of those without room.

One `Arrival` per version, whoever asks: all who wait for it get the same end, each exactly once. Who needs others
beside it says which: they do not leave to make room for it, unless somebody waits for it alone. Used on the event loop;
knows no bytes' budget, no engine, and not how a version is read.
"""

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator

from adapters.adapter_ref import AdapterVersion
from adapters.lora_model import LoRAModel


class Arrival:
    """`model` is what arrives when it has been read already. `since`: when the first asked, in the loop's time."""

    def __init__(
        self, version: AdapterVersion, num_bytes: int, *, since: float, model: LoRAModel | None = None
    ) -> None:
        self.version = version
        self.num_bytes = num_bytes
        self.since = since
        self.model = model
        self._waiters: dict[asyncio.Future[None], frozenset[AdapterVersion]] = {}  # what each needs beside it

    @property
    def num_waiting(self) -> int:
        return len(self._waiters)

    @property
    def needs(self) -> Iterable[frozenset[AdapterVersion]]:
        """What each who waits needs beside it."""
        return self._waiters.values()

    @property
    def beside(self) -> frozenset[AdapterVersion]:
        """What all who wait need beside it."""
        return frozenset.intersection(*self._waiters.values()) if self._waiters else frozenset()

    def join(self, beside: frozenset[AdapterVersion] = frozenset()) -> "asyncio.Future[None]":
        """Wait for the end with the others; whoever joins also leaves."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters[waiter] = beside
        return waiter

    def leave(self, waiter: "asyncio.Future[None]") -> None:
        self._waiters.pop(waiter, None)

    def succeed(self) -> None:
        for waiter in self._take_waiters():
            waiter.set_result(None)

    def fail(self, error: BaseException) -> bool:
        """Tell all who wait; False when nobody did."""
        waiters = self._take_waiters()
        for waiter in waiters:
            waiter.set_exception(error)
        return bool(waiters)

    def _take_waiters(self) -> list["asyncio.Future[None]"]:
        waiters, self._waiters = self._waiters, {}
        return [waiter for waiter in waiters if not waiter.done()]


class ArrivalQueue:
    """Arrivals without room, those asked for first in front."""

    def __init__(self) -> None:
        self._arrivals: dict[AdapterVersion, Arrival] = {}
        self._num_beside: Counter[AdapterVersion] | None = None  # counted when asked for

    def add(self, arrival: Arrival) -> None:
        assert arrival.version not in self._arrivals
        self._arrivals[arrival.version] = arrival
        self.changed()
        self._put_in_order(arrival)

    def move_up(self, arrival: Arrival, since: float) -> None:
        """Somebody who has waited since then waits for it now."""
        if since < arrival.since:
            arrival.since = since
            self._put_in_order(arrival)

    def _put_in_order(self, moved: Arrival) -> None:
        if any(arrival.since > moved.since for arrival in self):
            self._arrivals = dict(sorted(self._arrivals.items(), key=lambda item: item[1].since))

    def remove(self, arrival: Arrival) -> None:
        del self._arrivals[arrival.version]
        self.changed()

    def get(self, version: AdapterVersion) -> Arrival | None:
        return self._arrivals.get(version)

    def num_waiting_for(self, version: AdapterVersion) -> int:
        """Callers, not versions."""
        arrival = self._arrivals.get(version)
        return 0 if arrival is None else arrival.num_waiting

    def num_beside(self, version: AdapterVersion) -> int:
        """Callers who wait for another and need this one beside it."""
        if self._num_beside is None:
            self._num_beside = Counter(each for arrival in self for needs in arrival.needs for each in needs)
        return self._num_beside[version]

    def changed(self) -> None:
        """Somebody joined or left an arrival."""
        self._num_beside = None

    def __iter__(self) -> Iterator[Arrival]:
        return iter(self._arrivals.values())

    def __len__(self) -> int:
        return len(self._arrivals)

    def __contains__(self, arrival: object) -> bool:
        return isinstance(arrival, Arrival) and self._arrivals.get(arrival.version) is arrival

    def check_integrity(self) -> None:
        """Raises AssertionError when somebody overtook, or a version waits that nobody waits for."""
        ages = [arrival.since for arrival in self]
        assert ages == sorted(ages)
        assert all(arrival.num_waiting for arrival in self)
        assert all(arrival.version == version for version, arrival in self._arrivals.items())
