"""Plans of recent loads, for adapters whose headers and configs are equal: the same training at another time.

Bounded in number and in bytes, the least recently used goes first. Any thread may ask. Knows nothing of what makes a
plan; a load that is refused leaves none.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock

from adapters.load_plan import LoadPlan

MAX_PLANS = 64
MAX_BYTES = 64 << 20


class PlanCache:
    def __init__(self, *, max_plans: int = MAX_PLANS, max_bytes: int = MAX_BYTES) -> None:
        self._max_plans = max_plans
        self._max_bytes = max_bytes
        self._plans: OrderedDict[Hashable, LoadPlan] = OrderedDict()
        self._num_bytes = 0
        self._lock = Lock()

    def plan(self, key: Hashable, make: Callable[[], LoadPlan]) -> LoadPlan:
        """The plan of `key`, made outside the lock if there is none: of two that are made, the first stays."""
        with self._lock:
            if key in self._plans:
                self._plans.move_to_end(key)
                return self._plans[key]
        made = make()
        with self._lock:
            if key not in self._plans:
                self._plans[key] = made
                self._num_bytes += made.num_bytes
                self._shrink()
            return self._plans.get(key, made)

    def __len__(self) -> int:
        return len(self._plans)

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def _shrink(self) -> None:
        while self._plans and (len(self._plans) > self._max_plans or self._num_bytes > self._max_bytes):
            _, plan = self._plans.popitem(last=False)
            self._num_bytes -= plan.num_bytes
