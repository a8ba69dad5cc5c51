"""Which of several things was worth keeping least: LFU with dynamic ageing (LFU-DA). No bytes, no clock, no event loop.

    key := age when last used + number of uses since added        age := key of the last one evicted

The least key goes first. A use makes a key grow, evictions make the age grow, so that what was popular once falls
behind what is used now. All adapters cost the same per byte to load again, so neither size nor cost is in the key.

Two departures from the textbook:

- Of equal keys the one used **last** goes first. The other way round a scan of a set one larger than the room evicts
  each just before its turn and hits nothing, as LRU does; this way most of the set stays.
- Uses count up to `max_uses`. Uses outnumber evictions by far, so the age would need ages to pass an adapter that
  was asked for a million times last week.
"""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)

MAX_USES = 16
"""Costs zipf streams at most 0.015 of their hits; where what is popular changes, 0.06 to 0.07 are won."""


@dataclass(slots=True)
class _Worth:
    num_uses: int
    key: int
    used_at: int  # in uses of anything


class LFUWithAgeing(Generic[Item]):
    def __init__(self, max_uses: int = MAX_USES) -> None:
        self.age = 0
        self._max_uses = max_uses
        self._num_uses = 0
        self._worth: dict[Item, _Worth] = {}

    def add(self, item: Item) -> None:
        """Know an item, without a use so far."""
        assert item not in self._worth
        self._num_uses += 1
        self._worth[item] = _Worth(0, self.age, self._num_uses)

    def use(self, item: Item) -> None:
        worth = self._worth[item]
        self._num_uses += 1
        worth.used_at = self._num_uses
        worth.num_uses = min(worth.num_uses + 1, self._max_uses)
        worth.key = self.age + worth.num_uses

    def evict(self, item: Item) -> None:
        """Forget an item that others needed the room of. Never younger: it may have gone before one worth less."""
        self.age = max(self.age, self._worth.pop(item).key)

    def forget(self, item: Item) -> None:
        """Forget an item nobody wants any more, which says nothing of the worth of others."""
        del self._worth[item]

    def worth(self, item: Item) -> tuple[int, int]:
        """Of several items the one with the least goes first."""
        worth = self._worth[item]
        return worth.key, -worth.used_at

    def __iter__(self) -> Iterator[Item]:
        return iter(self._worth)

    def __len__(self) -> int:
        return len(self._worth)

    def check_integrity(self) -> None:
        """Raises AssertionError when a key is not what uses and age can have made it."""
        for worth in self._worth.values():
            assert 0 <= worth.num_uses <= self._max_uses
            assert worth.num_uses <= worth.key <= self.age + worth.num_uses
        assert len({worth.used_at for worth in self._worth.values()}) == len(self._worth), "two are worth the same"
