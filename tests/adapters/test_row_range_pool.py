"""The row-range pool against a model that knows only which rows are whose, and its rules one by one."""

from collections import Counter
from itertools import combinations
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from adapters.adapter_ref import AdapterVersion
from adapters.row_range_pool import RowRange, RowRangePool

A, B, C, D = (AdapterVersion(letter) for letter in "abcd")


def filled(num_rows: int, ranks: dict[AdapterVersion, int], uses: str = "") -> RowRangePool:
    """A pool with `ranks` resident in that order, each letter of `uses` counted, nothing pinned or pending."""
    pool = RowRangePool(num_rows)
    for version, rank in ranks.items():
        assert pool.pin(version, rank)
    for letter in uses:
        pool.count_use(AdapterVersion(letter))
    pool.begin_step()
    pool.take_pending()
    return pool


def test_first_fit_takes_the_lowest_hole() -> None:
    pool = filled(16, {A: 4, B: 4, C: 4})
    assert pool.drop(A) == RowRange(0, 4)
    assert pool.pin(D, 3)
    assert pool.range_of(D) == RowRange(0, 3)
    assert pool.num_free_rows == 5


def test_the_version_used_least_is_evicted_and_only_it() -> None:
    pool = filled(12, {A: 4, B: 4, C: 4}, uses="aabcc")
    assert pool.pin(D, 4)
    assert pool.range_of(D) == RowRange(4, 4)
    assert pool.versions == (A, C, D)
    assert pool.take_pending() == [(D, RowRange(4, 4))]
    assert pool.num_evictions == 1


def test_steps_of_one_long_request_do_not_make_a_version_popular() -> None:
    pool = filled(8, {A: 4, B: 4}, uses="abb")
    for _ in range(50):  # a request of A's goes on
        pool.begin_step()
        assert pool.pin(A, 4)
    pool.begin_step()
    assert pool.pin(C, 4)
    assert pool.versions == (B, C)


def test_what_waiting_requests_need_goes_last_but_goes() -> None:
    pool = filled(12, {A: 4, B: 4, C: 4}, uses="aabbbc")
    pool.begin_step([C, B])
    assert pool.pin(D, 4)
    assert pool.versions == (B, C, D)
    pool.begin_step([D, B, C])
    assert pool.pin(A, 4)
    assert pool.versions == (B, C, A), "D has no use yet"
    pool.begin_step([B])
    assert pool.pin(D, 12)
    assert pool.versions == (D,)


def test_uses_are_remembered_over_eviction() -> None:
    pool = filled(8, {A: 4, B: 4}, uses="aaaabb")
    pool.drop(A)
    assert pool.pin(A, 4)  # back again, with its four uses
    pool.begin_step()
    assert pool.pin(C, 4)
    assert pool.versions == (A, C)


def test_what_was_popular_once_gives_way() -> None:
    pool = filled(12, {A: 4, B: 4, C: 4}, uses=40 * "a" + 400 * "b" + 3 * "c")
    assert pool.pin(D, 4)
    assert pool.versions == (B, C, D)


def test_a_cycle_one_longer_than_the_pool_finds_most_of_it_in_place() -> None:
    """Dropping the longest unused finds nothing: the cliff of one adapter too many."""
    pool, cycle = RowRangePool(32), [AdapterVersion(f"cycle{i}") for i in range(9)]
    num_found = 0
    for i in range(900):
        version = cycle[i % 9]
        pool.begin_step()
        num_found += version in pool.versions
        assert pool.pin(version, 4)
        pool.count_use(version)
    assert num_found > 600


def test_a_wide_adapter_evicts_neighbours_that_together_make_a_hole() -> None:
    pool = filled(12, {A: 2, B: 6, C: 2, D: 2}, uses="abccdd")
    wide = AdapterVersion("wide")
    assert pool.pin(wide, 8)
    assert pool.versions == (C, D, wide)  # rows [0, 8)
    assert pool.range_of(wide) == RowRange(0, 8)


def test_pinned_versions_are_never_evicted() -> None:
    pool = filled(8, {A: 4, B: 4}, uses="bb")
    assert pool.pin(A, 4)
    assert pool.pin(C, 4)
    assert not pool.pin(D, 4)
    assert pool.versions == (A, C)
    pool.begin_step()
    pool.count_use(C)
    assert pool.pin(D, 4)
    assert pool.versions == (C, D)


def test_ranges_move_together_when_a_pinned_one_divides_the_free_rows() -> None:
    pool = filled(12, {A: 4, B: 4, C: 4})
    assert pool.pin(B, 4)  # rows [4, 8): no hole of 8 without moving it
    assert pool.pin(D, 8)
    assert pool.range_of(B) == RowRange(0, 4)
    assert pool.range_of(D) == RowRange(4, 8)
    assert sorted(pool.take_pending()) == [(B, RowRange(0, 4)), (D, RowRange(4, 8))]
    pool.check_integrity()


def test_as_few_rows_as_can_be_are_moved_so_that_nothing_needed_goes() -> None:
    names = [AdapterVersion(f"{i}") for i in range(12)]
    gone = {(): [8, 10], (10,): [5, 8], (5, 10): [8, 10]}  # what is needed → what is evicted
    for needed, evicted in gone.items():
        pool = filled(48, dict.fromkeys(names, 4))
        pool.begin_step([names[i] for i in needed])
        for i in (0, 2, 3, 4, 6, 7, 9, 11):
            assert pool.pin(names[i], 4)
        assert pool.pin(A, 8)
        assert [i for i in range(12) if names[i] not in pool.versions] == evicted
        first, last = evicted
        assert pool.range_of(A) == RowRange(4 * last - 4, 8)
        moved = {names[i]: RowRange(4 * i - 4, 4) for i in range(first + 1, last)}
        assert dict(pool.take_pending()) == {**moved, A: RowRange(4 * last - 4, 8)}
        pool.check_integrity()


@pytest.mark.parametrize("seed", range(5))
def test_mixed_ranks_waste_no_more_than_the_last_bit(seed: int) -> None:
    """After any churn a full step holds all rows but a remainder narrower than what was refused."""
    random = Random(seed)
    ranks = {AdapterVersion(f"v{i}"): (8, 16, 32, 64)[i % 4] for i in range(200)}
    pool = RowRangePool(1024)
    ratios = []
    for _ in range(60):
        pool.begin_step()
        pinned = 0
        for version in random.sample(list(ranks), 60):
            fits = pinned + ranks[version] <= 1024
            assert pool.pin(version, ranks[version]) is fits
            pinned += ranks[version] * fits
        ratios.append(1024 / pinned)
        pool.check_integrity()
    assert max(ratios) <= 1.05 and pool.num_evictions > 1000


def test_a_rank_wider_than_the_pool_does_not_fit_and_evicts_nothing() -> None:
    pool = filled(8, {A: 4})
    assert not pool.pin(B, 9)
    assert pool.versions == (A,)


def test_max_loras_caps_the_versions_of_one_step() -> None:
    pool = RowRangePool(100, max_loras=2)
    assert pool.pin(A, 1) and pool.pin(B, 1) and pool.pin(A, 1)
    assert not pool.pin(C, 1)
    pool.begin_step()
    assert pool.pin(C, 1)
    assert pool.versions == (A, B, C)


def test_a_version_dropped_before_it_was_written_is_no_longer_pending() -> None:
    pool = RowRangePool(4)
    assert pool.pin(A, 4)
    assert pool.drop(A) == RowRange(0, 4)
    assert pool.drop(A) is None
    assert pool.take_pending() == []
    with pytest.raises(KeyError):
        pool.range_of(A)


def test_misuse_is_an_error() -> None:
    pool = filled(8, {A: 4})
    with pytest.raises(ValueError, match="holds 4 rows but is pinned with rank 5"):
        pool.pin(A, 5)
    with pytest.raises(ValueError, match="at least rank 1"):
        pool.pin(B, 0)
    with pytest.raises(ValueError, match="positive"):
        RowRangePool(0)


@pytest.mark.parametrize(
    "free",
    [[RowRange(0, 4)], [RowRange(4, 4), RowRange(8, 4)], [RowRange(4, 5)], []],
    ids=["rows lost", "holes not joined", "beyond the end", "none"],
)
def test_check_integrity_sees_a_broken_free_list(free: list[RowRange]) -> None:
    pool = RowRangePool(12)
    pool.pin(A, 4)
    pool.check_integrity()
    pool._free = free
    with pytest.raises(AssertionError):
        pool.check_integrity()


Worth = tuple[bool, int, int]  # is needed, uses, minus when it was pinned last
NOTHING: Worth = (False, -1, 0)


def test_bytes_beside_the_rows_are_a_limit_of_their_own() -> None:
    pool = RowRangePool(100, max_extra_bytes=10)
    assert pool.pin(A, 4, 6) and pool.pin(B, 4, 3) and pool.pin(C, 4)
    assert not pool.pin(D, 4, 2), "one byte too many, and all that are there are pinned"
    assert pool.num_extra_bytes == 9 and pool.versions == (A, B, C)
    pool.begin_step()
    assert pool.pin(A, 4, 6) and pool.pin(D, 4, 4)
    assert pool.versions == (C, A, D), "B's bytes were taken; C has none and may stay"
    assert pool.take_freed() == [RowRange(4, 4)] and pool.range_of(D) == RowRange(4, 4)
    pool.begin_step()
    assert not pool.pin(B, 4, 11), "it could never fit"
    with pytest.raises(ValueError, match="holds 6 bytes, not 7"):
        pool.pin(A, 4, 7)
    pool.check_integrity()


def test_whose_bytes_are_not_needed_after_all_stays() -> None:
    pool = RowRangePool(100, max_extra_bytes=10)
    assert pool.pin(A, 4, 2) and pool.pin(B, 4, 8)
    pool.begin_step()
    pool.count_use(B)
    assert pool.pin(D, 4, 7)
    assert pool.versions == (A, D), "A is worth less than B, but its bytes alone are too few and with B's not needed"


class PoolMachine(RuleBasedStateMachine):
    """The model is a row → version list, a clock of pins and plain counts; windows are found by trying every start."""

    versions = Bundle("versions")

    @initialize(
        num_rows=st.integers(1, 24),
        max_loras=st.none() | st.integers(1, 4),
        max_extra_bytes=st.none() | st.integers(0, 30),
    )
    def make(self, num_rows: int, max_loras: int | None, max_extra_bytes: int | None) -> None:
        self.pool = RowRangePool(num_rows, max_loras=max_loras, max_extra_bytes=max_extra_bytes)
        self.ranks: dict[AdapterVersion, int] = {}
        self.extra_bytes: dict[AdapterVersion, int] = {}
        self.pinned: set[AdapterVersion] = set()
        self.needed: set[AdapterVersion] = set()
        self.unwritten: set[AdapterVersion] = set()
        self.freed: list[RowRange] = []
        self.last_pin: dict[AdapterVersion, int] = {}
        self.clock = 0
        self.uses: Counter[AdapterVersion] = Counter()
        self.num_uses = self.num_evictions = 0

    def rows(self) -> list[AdapterVersion | None]:
        rows: list[AdapterVersion | None] = [None] * self.pool.num_rows
        for version in self.pool.versions:
            held = self.pool.range_of(version)
            for row in range(held.start, held.end):
                assert rows[row] is None
                rows[row] = version
        return rows

    def worth(self, version: AdapterVersion) -> Worth:
        return version in self.needed, self.uses[version], -self.last_pin[version]

    def cheapest(self, rows: list[AdapterVersion | None], rank: int) -> tuple[Worth, int] | None:
        """(worth of the best victim, number of victims) of the best window; None = all blocked by pins."""
        costs = []
        for start in range(len(rows) - rank + 1):
            victims = {version for version in rows[start : start + rank] if version is not None}
            if not victims & self.pinned:
                costs.append((max(map(self.worth, victims), default=NOTHING), len(victims)))
        return min(costs, default=None)

    def fewest_moved(self, rows: list[AdapterVersion | None], rank: int) -> tuple[bool, int]:
        """(whether something needed is evicted, at most how many rows move) when pinned ranges move together."""
        edges = [0, *(i for i in range(1, len(rows)) if rows[i] is None or rows[i] != rows[i - 1]), len(rows)]
        costs = []
        for begin, end in combinations(edges, 2):
            num_pinned = sum(version in self.pinned for version in rows[begin:end])
            if end - begin - num_pinned >= rank:
                evicted = {version for version in rows[begin:end] if version is not None} - self.pinned
                costs.append((bool(evicted & self.needed), num_pinned))
        return min(costs)

    def byte_victims(self, version: AdapterVersion) -> set[AdapterVersion]:
        """Who has to go for a version's bytes: of those worth least, so many that it is enough, and then whoever of
        them need not, the one worth most first."""
        limit, resident = self.pool.room.max_extra_bytes, set(self.pool.versions)
        if limit is None or version in resident:
            return set()
        holders = sorted((v for v in resident - self.pinned if self.extra_bytes[v]), key=self.worth)
        lacking = sum(self.extra_bytes[v] for v in resident | {version}) - limit
        gone: set[AdapterVersion] = set()
        for num_gone in range(len(holders) + 1):
            gone = set(holders[:num_gone])
            if sum(self.extra_bytes[v] for v in gone) >= lacking:
                break
        for v in sorted(gone, key=self.worth, reverse=True):
            if sum(self.extra_bytes[other] for other in gone - {v}) >= lacking:
                gone.remove(v)
        return gone

    @rule(
        target=versions,
        name=st.text("xyz", min_size=1, max_size=3),
        rank=st.integers(1, 12),
        extra_bytes=st.integers(0, 12),
    )
    def new_version(self, name: str, rank: int, extra_bytes: int) -> AdapterVersion:
        self.ranks.setdefault(AdapterVersion(name), rank)
        self.extra_bytes.setdefault(AdapterVersion(name), extra_bytes)
        return AdapterVersion(name)

    @rule(version=versions)
    def pin(self, version: AdapterVersion) -> None:
        rank, room = self.ranks[version], self.pool.room
        before = {v: self.pool.range_of(v) for v in self.pool.versions}
        capped = room.max_loras is not None and len(self.pinned | {version}) > room.max_loras
        fits = sum(self.ranks[v] for v in self.pinned | {version}) <= room.num_rows
        if room.max_extra_bytes is not None:
            fits &= sum(self.extra_bytes[v] for v in self.pinned | {version}) <= room.max_extra_bytes
        gone = self.byte_victims(version) if fits and not capped else set()
        rows = [None if row in gone else row for row in self.rows()]
        cost = self.cheapest(rows, rank)
        got = self.pool.pin(version, rank, self.extra_bytes[version])
        assert got == (fits and not capped)
        evicted = before.keys() - set(self.pool.versions)
        self.num_evictions += len(evicted)
        assert gone <= evicted and not evicted & self.pinned
        evicted -= gone
        moved = {v for v in before.keys() - evicted - gone if self.pool.range_of(v) != before[v]}
        if not got or version in before:
            assert {v: self.pool.range_of(v) for v in self.pool.versions} == before
        elif cost is not None:
            assert (max(map(self.worth, evicted), default=NOTHING), len(evicted)) == cost
            assert not moved
        else:
            is_needed, most = self.fewest_moved(rows, rank)
            assert bool(evicted & self.needed) == is_needed
            assert sum(self.ranks[v] for v in moved) <= most and moved <= self.pinned
        evicted |= gone
        self.freed += [before[v] for v in evicted | moved]
        if got and version not in self.pinned:  # a version is pinned once a step
            self.unwritten = (self.unwritten - evicted) | moved | ({version} - before.keys())
            self.pinned.add(version)
            self.clock += 1
            self.last_pin[version] = self.clock

    @rule(data=st.data())
    def begin_step(self, data: st.DataObject) -> None:
        self.needed = data.draw(st.sets(st.sampled_from(sorted(self.ranks)))) if self.ranks else set()
        self.pool.begin_step(self.needed)
        self.pinned.clear()

    @rule(version=versions, times=st.integers(1, 9))
    def count_use(self, version: AdapterVersion, times: int) -> None:
        for _ in range(times):
            self.pool.count_use(version)
            self.uses[version] += 1
            self.num_uses += 1
            if self.num_uses >= 16 * max(len(self.pool.versions), 1):
                self.num_uses = 0
                self.uses = Counter({v: count // 2 for v, count in self.uses.items()})

    @rule(version=versions)
    def drop(self, version: AdapterVersion) -> None:
        held = self.pool.range_of(version) if version in self.pool.versions else None
        assert self.pool.drop(version) == held
        self.pinned.discard(version)
        self.unwritten.discard(version)

    @rule()
    def take_pending(self) -> None:
        pending = self.pool.take_pending()
        assert {v for v, _ in pending} == self.unwritten
        assert all(self.pool.range_of(v) == row_range for v, row_range in pending)
        self.unwritten.clear()

    @rule()
    def take_freed(self) -> None:
        assert sorted(self.pool.take_freed()) == sorted(self.freed)
        self.freed.clear()

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check_integrity()
        assert self.pool.num_extra_bytes == sum(self.extra_bytes[v] for v in self.pool.versions)
        assert self.pool.num_free_rows == self.rows().count(None)
        assert self.pinned <= set(self.pool.versions)
        assert self.pool.num_evictions == self.num_evictions
        assert all(self.pool.range_of(v).length == self.ranks[v] for v in self.pool.versions)
        assert list(self.pool.versions) == sorted(self.pool.versions, key=self.last_pin.__getitem__)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
