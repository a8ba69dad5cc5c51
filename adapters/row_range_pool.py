"""Which rows of the device pools each adapter version holds, within a budget of bytes that they take beside them.
Integers only: knows no tensors and copies nothing.

A version of rank r holds r consecutive rows, the same in every module's pool. `pin` makes a version resident for the
step under way: first fit among the holes, then by evicting versions not pinned this step (those worth least, as few as
a hole of that size takes), at last by moving pinned ranges together, as few rows as can be. So a pin succeeds exactly
when the rows pinned this step and the new ones fit together, and the bytes beside them do. Data follows through
`take_freed` and `take_pending`, before the forward pass.

Worth most is what waiting requests need, then what was used most, counting lately begun requests: a long answer is one
use. Among equals the one pinned last goes first, since of a cycle one version longer than the pool, dropping the oldest
would find nothing in place.
"""

from bisect import bisect_left
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from adapters.adapter_ref import AdapterVersion
from adapters.device_room import DeviceRoom
from adapters.use_counts import UseCounts


@dataclass(frozen=True, slots=True, order=True)
class RowRange:
    """Pool rows [start, start + length)."""

    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


_Worth = tuple[bool, int, int]  # is needed, uses, steps since another was pinned later


class RowRangePool:
    def __init__(self, num_rows: int, *, max_loras: int | None = None, max_extra_bytes: int | None = None) -> None:
        """`max_loras` caps the versions pinned in one step, `max_extra_bytes` what all that hold rows take beside them;
        None leaves the rows as the only limit."""
        if num_rows < 1 or (max_loras is not None and max_loras < 1):
            raise ValueError(f"a row-range pool of {num_rows} rows and max_loras={max_loras}: both must be positive")
        self.room = DeviceRoom(num_rows=num_rows, max_loras=max_loras, max_extra_bytes=max_extra_bytes)
        self._free = [RowRange(0, num_rows)]  # by start; no two adjacent
        self._ranges: dict[AdapterVersion, RowRange] = {}  # the longest unpinned first
        self._extra_bytes: dict[AdapterVersion, int] = {}  # of those with a range
        self._pinned: set[AdapterVersion] = set()
        self._needed: frozenset[AdapterVersion] = frozenset()  # by requests that wait
        self._uses = UseCounts()
        self.num_evictions = 0  # versions that lost their rows to others
        self._pending: dict[AdapterVersion, None] = {}  # ranges whose rows are still to be written
        self._freed: list[RowRange] = []  # left by eviction or a move; what is written there is still to be forgotten

    @property
    def num_rows(self) -> int:
        return self.room.num_rows

    @property
    def num_extra_bytes(self) -> int:
        """Bytes that the versions with a range take beside it."""
        return sum(self._extra_bytes.values())

    @property
    def versions(self) -> tuple[AdapterVersion, ...]:
        """The resident versions, the longest unpinned first."""
        return tuple(self._ranges)

    @property
    def num_free_rows(self) -> int:
        return sum(hole.length for hole in self._free)

    def begin_step(self, needed: Collection[AdapterVersion] = ()) -> None:
        """Forget the pins of the step before; every range stays where it is until a pin needs its rows. `needed`
        versions, which waiting requests name, are evicted after all others."""
        self._pinned.clear()
        self._needed = frozenset(needed)

    def count_use(self, version: AdapterVersion) -> None:
        """A request began to use a version: what is used often stays."""
        self._uses.add(version, num_kept=len(self._ranges))

    def pin(self, version: AdapterVersion, lora_rank: int, num_extra_bytes: int = 0) -> bool:
        """Make `version` resident for this step; False when it does not fit beside the versions already pinned.

        May move ranges, pinned ones too: ask `range_of` after the last pin of a step.
        """
        self._check_need(version, lora_rank, num_extra_bytes)
        if version in self._pinned:
            return True
        if self.room.max_loras is not None and len(self._pinned) >= self.room.max_loras:
            return False
        if version not in self._ranges:
            if not self._make_room(lora_rank, num_extra_bytes):
                return False
            self._ranges[version] = self._take_first_fit(lora_rank)
            self._extra_bytes[version] = num_extra_bytes
            self._pending[version] = None
        self._ranges[version] = self._ranges.pop(version)  # now the last pinned
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

    def take_freed(self) -> list[RowRange]:
        """The ranges that versions lost or were moved from since the last call. Whatever else stands there by now is
        pending: forget what they held before that is written."""
        freed, self._freed = self._freed, []
        return freed

    def drop(self, version: AdapterVersion) -> RowRange | None:
        """Free the rows of a version and say which they were; None when it held none."""
        freed = self._ranges.pop(version, None)
        if freed is not None:
            self._pinned.discard(version)
            self._pending.pop(version, None)
            del self._extra_bytes[version]
            self._release(freed)
        return freed

    def _evict(self, version: AdapterVersion) -> None:
        self.num_evictions += 1
        self._freed.append(self._ranges[version])
        self.drop(version)

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
        assert set(newest) == self._pinned, "pinned versions are not the last in order"
        assert self._pending.keys() <= self._ranges.keys(), "a version without a range is pending"
        assert self._extra_bytes.keys() == self._ranges.keys(), "bytes are counted of versions without a range"
        limit = self.room.max_extra_bytes
        assert limit is None or self.num_extra_bytes <= limit, "more bytes beside the rows than there are"
        assert self.room.max_loras is None or len(self._pinned) <= self.room.max_loras, (
            "more versions pinned than max_loras"
        )
        self._uses.check_integrity()

    def _check_need(self, version: AdapterVersion, lora_rank: int, num_extra_bytes: int) -> None:
        if lora_rank < 1:
            raise ValueError(f"version {version} of rank {lora_rank}: an adapter has at least rank 1")
        held = self._ranges.get(version)
        if held is not None and held.length != lora_rank:
            raise ValueError(f"version {version} holds {held.length} rows but is pinned with rank {lora_rank}")
        if self._extra_bytes.get(version, num_extra_bytes) != num_extra_bytes:
            raise ValueError(f"version {version} holds {self._extra_bytes[version]} bytes, not {num_extra_bytes}")

    def _make_room(self, length: int, num_bytes: int) -> bool:
        """See that so many bytes are free and a hole of `length` rows exists, at the least cost that does it."""
        max_bytes = self.room.max_extra_bytes
        if sum(self._ranges[version].length for version in self._pinned) + length > self.num_rows:
            return False
        if max_bytes is not None:
            if sum(self._extra_bytes[version] for version in self._pinned) + num_bytes > max_bytes:
                return False
            self._free_bytes(self.num_extra_bytes + num_bytes - max_bytes)
        if any(hole.length >= length for hole in self._free):
            return True
        victims = self._cheapest_window(length)
        if victims is None:  # pinned ranges stand in the way of every hole
            self._move_together(length)
        else:
            for version in victims:
                self._evict(version)
        return True

    def _free_bytes(self, lacking: int) -> None:
        """Evict what gives back `lacking` bytes: those worth least, and of these none that is not needed for it."""
        worth = self._worth()
        holders = [version for version, held in self._extra_bytes.items() if held and version not in self._pinned]
        victims: list[AdapterVersion] = []
        for version in sorted(holders, key=worth.__getitem__):
            if lacking <= 0:
                break
            victims.append(version)
            lacking -= self._extra_bytes[version]
        for version in reversed(victims):
            if lacking + self._extra_bytes[version] <= 0:
                lacking += self._extra_bytes[version]  # it may stay
            else:
                self._evict(version)

    def _cheapest_window(self, length: int) -> list[AdapterVersion] | None:
        """The unpinned versions whose rows, with the holes between, make `length` in a row: those where the one worth
        most is worth least, then the fewest. None when every such window touches a pinned range.
        """
        by_start = sorted(self._ranges.items(), key=lambda item: item[1])
        worth = self._worth()
        best: tuple[_Worth, int, list[AdapterVersion]] | None = None
        # A window pushed down until it meets a range has no more victims than before, so these starts suffice.
        for first, start in enumerate([0, *(row_range.end for _, row_range in by_start)]):
            victims = self._victims(by_start, first, start + length)
            if victims is not None and start + length <= self.num_rows:
                cost = (max(worth[version] for version in victims), len(victims), victims)
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

    def _worth(self) -> dict[AdapterVersion, _Worth]:
        """What a version is worth keeping for; no two are worth the same."""
        num_ranges = len(self._ranges)
        return {
            version: (version in self._needed, self._uses.of(version), num_ranges - place)
            for place, version in enumerate(self._ranges)
        }

    def _move_together(self, length: int) -> None:
        """Make a hole of `length` rows by moving pinned ranges; what moved is to be written again."""
        end, span = self._cheapest_span(length)
        pinned = [version for version in span if version in self._pinned]
        for version in span:
            if version not in self._pinned:
                self._evict(version)
        for version in pinned:
            held = self._ranges[version]
            if held.start != end:
                self._freed.append(held)
                self._ranges[version] = RowRange(end, held.length)
                self._pending[version] = None
            end += held.length
        self._free = list(self._holes())

    def _cheapest_span(self, length: int) -> tuple[int, list[AdapterVersion]]:
        """The first row of neighbours, and they in order, that leave `length` rows when those of them that are not
        pinned are evicted and the others moved together: those that evict nothing needed, then the fewest rows to move.
        """
        by_start = sorted(self._ranges.items(), key=lambda item: item[1])
        worth = self._worth()
        ends = [0, *(row_range.end for _, row_range in by_start)]
        starts = [*(row_range.start for _, row_range in by_start), self.num_rows]
        best: tuple[bool, int, int, int] | None = None
        for first, begin in enumerate(ends):
            is_needed, num_pinned = False, 0
            for after in range(first, len(starts)):  # neighbours [first, after)
                if starts[after] - begin - num_pinned >= length:
                    cost = (is_needed, num_pinned, first, after)
                    best = cost if best is None else min(best, cost)
                    break
                if after < len(by_start):
                    version, row_range = by_start[after]
                    num_pinned += row_range.length if version in self._pinned else 0
                    is_needed |= version not in self._pinned and worth[version][0]
        assert best is not None, f"{length} rows do not fit beside the pinned ones"
        return ends[best[2]], [version for version, _ in by_start[best[2] : best[3]]]

    def _holes(self) -> Iterator[RowRange]:
        end = 0
        for held in [*sorted(self._ranges.values()), RowRange(self.num_rows, 0)]:
            if held.start > end:
                yield RowRange(end, held.start - end)
            end = held.end

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
