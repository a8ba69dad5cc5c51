"""Which rows of the device pools each adapter version holds. Integers only: knows no tensors and copies nothing.

A version of rank r holds r consecutive rows, the same in every module's pool. `pin` makes a version resident for the
step under way: first fit among the holes, then by evicting versions not pinned this step (the longest unused first, as
few as a hole of that size takes), at last by moving ranges together. So a pin succeeds exactly when the rows
pinned this step and the new ones fit together. Data follows through `take_pending`, before the forward pass.
"""

from bisect import bisect_left
from dataclasses import dataclass

from adapters.adapter_ref import AdapterVersion


@dataclass(frozen=True, slots=True, order=True)
class RowRange:
    """Pool rows [start, start + length)."""

    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


class RowRangePool:
    def __init__(self, num_rows: int, *, max_loras: int | None = None) -> None:
        """`max_loras` caps the versions pinned in one step; None leaves the rows as the only limit."""
        if num_rows < 1 or (max_loras is not None and max_loras < 1):
            raise ValueError(f"a row-range pool of {num_rows} rows and max_loras={max_loras}: both must be positive")
        self.num_rows = num_rows
        self.max_loras = max_loras
        self._free = [RowRange(0, num_rows)]  # by start; no two adjacent
        self._ranges: dict[AdapterVersion, RowRange] = {}  # the longest unused first
        self._pinned: set[AdapterVersion] = set()
        self._pending: dict[AdapterVersion, None] = {}  # ranges whose rows are still to be written

    @property
    def versions(self) -> tuple[AdapterVersion, ...]:
        """The resident versions, the longest unused first."""
        return tuple(self._ranges)

    @property
    def num_free_rows(self) -> int:
        return sum(hole.length for hole in self._free)

    def begin_step(self) -> None:
        """Forget the pins of the step before; every range stays where it is until a pin needs its rows."""
        self._pinned.clear()

    def pin(self, version: AdapterVersion, lora_rank: int) -> bool:
        """Make `version` resident for this step; False when it does not fit beside the versions already pinned.

        May move ranges, pinned ones too: ask `range_of` after the last pin of a step.
        """
        self._check_rank(version, lora_rank)
        if version in self._pinned:
            return True
        if self.max_loras is not None and len(self._pinned) >= self.max_loras:
            return False
        if version not in self._ranges:
            if not self._make_room(lora_rank):
                return False
            self._ranges[version] = self._take_first_fit(lora_rank)
            self._pending[version] = None
        self._ranges[version] = self._ranges.pop(version)  # now the last used
        self._pinned.add(version)
        return True

    def range_of(self, version: AdapterVersion) -> RowRange:
        """KeyError when the version is not resident."""
        return self._ranges[version]

    def take_pending(self) -> list[tuple[AdapterVersion, RowRange]]:
        """The ranges made or moved since the last call; their rows must be written before the forward pass."""
        pending = [(version, self._ranges[version]) for version in self._pending]
        self._pending.clear()
        return pending

    def drop(self, version: AdapterVersion) -> RowRange | None:
        """Free the rows of a version and say which they were; None when it held none."""
        freed = self._ranges.pop(version, None)
        if freed is not None:
            self._pinned.discard(version)
            self._pending.pop(version, None)
            self._release(freed)
        return freed

    def check_integrity(self) -> None:
        """Free and held ranges tile [0, num_rows) without overlap, holes are joined, pins are resident and newest."""
        held = list(self._ranges.values())
        end = 0
        for row_range in sorted(held + self._free):
            assert row_range.length > 0, f"empty range {row_range}"
            assert row_range.start == end, f"rows [{end}, {row_range.start}) are lost or held twice"
            end = row_range.end
        assert end == self.num_rows, f"ranges end at row {end} of {self.num_rows}"
        ends = {hole.end for hole in self._free}
        assert not any(hole.start in ends for hole in self._free), f"adjacent holes: {self._free}"
        newest = self.versions[len(self._ranges) - len(self._pinned) :]
        assert set(newest) == self._pinned, "pinned versions are not the last used"
        assert self._pending.keys() <= self._ranges.keys(), "a version without a range is pending"
        assert self.max_loras is None or len(self._pinned) <= self.max_loras, "more versions pinned than max_loras"

    def _check_rank(self, version: AdapterVersion, lora_rank: int) -> None:
        if lora_rank < 1:
            raise ValueError(f"version {version} of rank {lora_rank}: an adapter has at least rank 1")
        held = self._ranges.get(version)
        if held is not None and held.length != lora_rank:
            raise ValueError(f"version {version} holds {held.length} rows but is pinned with rank {lora_rank}")

    def _make_room(self, length: int) -> bool:
        """See that a hole of `length` rows exists, at the least cost that does it."""
        if any(hole.length >= length for hole in self._free):
            return True
        if sum(self._ranges[version].length for version in self._pinned) + length > self.num_rows:
            return False
        victims = self._cheapest_window(length)
        if victims is None:  # pinned ranges stand in the way of every hole
            self._evict_until(length)
            self._move_together()
        else:
            for version in victims:
                self.drop(version)
        return True

    def _cheapest_window(self, length: int) -> list[AdapterVersion] | None:
        """The unpinned versions whose rows, with the holes between, make `length` in a row: those where the last used
        of them was used longest ago, then the fewest. None when every such window touches a pinned range.
        """
        by_start = sorted(self._ranges.items(), key=lambda item: item[1])
        last_use = {version: use for use, version in enumerate(self._ranges)}
        best: tuple[int, int, list[AdapterVersion]] | None = None
        # A window pushed down until it meets a range has no more victims than before, so these starts suffice.
        for first, start in enumerate([0, *(row_range.end for _, row_range in by_start)]):
            victims = self._victims(by_start, first, start + length)
            if victims is not None and start + length <= self.num_rows:
                cost = (max(last_use[version] for version in victims), len(victims), victims)
                best = cost if best is None else min(best, cost)
        return None if best is None else best[2]

    def _victims(
        self, by_start: list[tuple[AdapterVersion, RowRange]], first: int, end: int
    ) -> list[AdapterVersion] | None:
        """The versions from by_start[first] on that begin before row `end`; None when a pinned one is among them."""
        victims: list[AdapterVersion] = []
        for index in range(first, len(by_start)):
            version, row_range = by_start[index]
            if row_range.start >= end:
                break
            if version in self._pinned:
                return None
            victims.append(version)
        return victims

    def _evict_until(self, length: int) -> None:
        """Evict the longest unused until `length` rows are free, wherever they are."""
        for version in self.versions:
            if self.num_free_rows >= length:
                return
            self.drop(version)

    def _move_together(self) -> None:
        """Move every range down to the one below it; what moved is to be written again."""
        end = 0
        for version, row_range in sorted(self._ranges.items(), key=lambda item: item[1]):
            if row_range.start != end:
                self._ranges[version] = RowRange(end, row_range.length)
                self._pending[version] = None
            end += row_range.length
        self._free = [RowRange(end, self.num_rows - end)] if end < self.num_rows else []

    def _take_first_fit(self, length: int) -> RowRange:
        index = next(i for i, hole in enumerate(self._free) if hole.length >= length)
        hole = self._free[index]
        rest = RowRange(hole.start + length, hole.length - length)
        self._free[index : index + 1] = [rest] if rest.length else []
        return RowRange(hole.start, length)

    def _release(self, freed: RowRange) -> None:
        """Put a range among the holes, joined with those it touches."""
        index = bisect_left(self._free, freed)
        low, high = freed.start, freed.end
        first, last = index, index
        if index > 0 and self._free[index - 1].end == low:
            first, low = index - 1, self._free[index - 1].start
        if index < len(self._free) and self._free[index].start == high:
            last, high = index + 1, self._free[index].end
        self._free[first:last] = [RowRange(low, high - low)]
