"""Whose adapters have room in this step, and who has waited for room too long. Knows no row ranges and no blocks.

Running requests ask first, in order of arrival, so the first of them always gets room and the set of running
requests always fits together. A waiting request without room is passed over; once that has happened
`max_bypassed_steps` times, no adapter behind it gets room until it runs (the drain rule), so a stream of requests
for adapters that are already there cannot starve it. Base requests need no room and are never held up here.
"""

from collections.abc import Collection, Iterable
from enum import Enum, auto
from typing import Protocol

from adapters.adapter_ref import AdapterUse, AdapterVersion
from server.engine.request import Request


class Residency(Protocol):
    """What can make adapters resident on the device for the length of one step."""

    def begin_step(self, needed: Collection[AdapterVersion]) -> None:
        """Forget the pins of the step before. `needed`, what waiting requests name, is given up last."""
        ...

    def count_use(self, uses: tuple[AdapterUse, ...]) -> None:
        """A request begins to use its adapters."""
        ...

    def pin(self, uses: tuple[AdapterUse, ...]) -> bool:
        """True when all of `uses` are, or are made, resident for this step; False when there is no room."""
        ...


class Room(Enum):
    GRANTED = auto()
    NOT_NOW = auto()
    NEVER = auto()  # refused with no other adapter in the way: waiting would not help


class AdapterRoom:
    def __init__(self, residency: Residency, max_bypassed_steps: int) -> None:
        self._residency = residency
        self._max_bypassed_steps = max_bypassed_steps
        self._answers: dict[tuple[AdapterUse, ...], Room] = {}  # of this step; room only shrinks within a step
        self._is_draining = False
        self._bypassed_steps: dict[str, int] = {}  # request id → steps it was passed over

    def begin_step(self, next_requests: Iterable[Request]) -> None:
        """`next_requests` are those at the head of the queue: what they need stays on the device where it can."""
        self._residency.begin_step({use.version for request in next_requests for use in request.adapters})
        self._answers.clear()
        self._is_draining = False

    def keep(self, request: Request) -> Room:
        """Room for a running request. While one has to sit out, no adapter of a waiting request gets in."""
        room = self._answers.get(request.adapters) or self._ask(request.adapters)
        if room is Room.NOT_NOW:
            self._is_draining = True
        return room

    def admit(self, request: Request) -> Room:
        """Room for a waiting request; to be asked in queue order, once per request and step."""
        if not request.adapters:
            return Room.GRANTED
        if self._is_draining:
            return Room.NOT_NOW
        room = self._answers.get(request.adapters) or self._ask(request.adapters)
        if room is Room.NOT_NOW:
            self._pass_over(request.request_id)
        return room

    def begin_use(self, request: Request) -> None:
        """A request that was granted room runs for the first time."""
        self._residency.count_use(request.adapters)

    def forget(self, request_id: str) -> None:
        """The request runs or has ended: its wait is over."""
        self._bypassed_steps.pop(request_id, None)

    @property
    def bypassed(self) -> frozenset[str]:
        """Ids of the requests that were passed over and still wait."""
        return frozenset(self._bypassed_steps)

    def _ask(self, adapters: tuple[AdapterUse, ...]) -> Room:
        if not adapters:
            return Room.GRANTED
        # Also a refusal may leave some of its adapters pinned, so only the first one of a step is final.
        refusal = Room.NOT_NOW if self._answers else Room.NEVER
        room = self._answers[adapters] = Room.GRANTED if self._residency.pin(adapters) else refusal
        return room

    def _pass_over(self, request_id: str) -> None:
        steps = self._bypassed_steps.get(request_id, 0)
        if steps >= self._max_bypassed_steps:
            self._is_draining = True
        else:
            self._bypassed_steps[request_id] = steps + 1
