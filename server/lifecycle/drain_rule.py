"""Which residents take no new users for a while, so that a version which has waited long gets room.

Without it A, A, A, … keeps B out for ever: before one user of A has ended the next has come. Once the first in the
queue has waited `after` seconds, enough residents to make room for it, and for the next few that have waited as long,
are held back: whoever asks for one of them then queues behind. Their running users finish, nobody takes their places,
and the wait is bounded by the longest of them. All other residents go on as before. Knows neither engine nor files.
"""

from itertools import islice

from adapters.adapter_ref import AdapterVersion
from server.lifecycle.arrivals import Arrival, ArrivalQueue
from server.lifecycle.host_room import HostRoom

_MAX_SERVED = 8  # of the longest waiting, room is made for so many at once; asked at every use, so it must stay cheap


class DrainRule:
    def __init__(self, room: HostRoom, queue: ArrivalQueue, *, after: float) -> None:
        self.after = after  # seconds
        self._room = room
        self._queue = queue
        self._held_back: set[AdapterVersion] = set()

    def is_due(self, arrival: Arrival, now: float) -> bool:
        """Nobody overtakes it any more."""
        return arrival.since + self.after <= now

    def holds_back(self, version: AdapterVersion, now: float) -> bool:
        """A new user of the resident `version` must queue."""
        first = next(iter(self._queue), None)
        if first is None or not self.is_due(first, now):
            self._held_back.clear()
            return False
        due = [arrival for arrival in islice(self._queue, _MAX_SERVED) if self.is_due(arrival, now)]
        # What is needed beside one of them makes no room for it by leaving.
        beside = frozenset().union(*(arrival.beside for arrival in due))
        absent = [arrival for arrival in due if arrival.version not in self._room]
        # Those chosen once stay so while somebody waits who is due, or the wait would have no bound.
        self._room.cover(self._held_back, sum(arrival.num_bytes for arrival in absent), len(absent), beside)
        return version in self._held_back
