"""The row-range pool against a model that knows only which rows are whose, and its rules one by one."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from adapters.adapter_ref import AdapterVersion
from adapters.row_range_pool import RowRange, RowRangePool

A, B, C, D = (AdapterVersion(letter) for letter in "abcd")


def filled(num_rows: int, ranks: dict[AdapterVersion, int]) -> RowRangePool:
    """A pool with `ranks` resident in that order, nothing pinned or pending."""
    pool = RowRangePool(num_rows)
    for version, rank in ranks.items():
        assert pool.pin(version, rank)
    pool.begin_step()
    pool.take_pending()
    return pool


def test_first_fit_takes_the_lowest_hole() -> None:
    pool = filled(16, {A: 4, B: 4, C: 4})
    assert pool.drop(A) == RowRange(0, 4)
    assert pool.pin(D, 3)
    assert pool.range_of(D) == RowRange(0, 3)
    assert pool.num_free_rows == 5


def test_the_longest_unused_version_is_evicted_and_only_it() -> None:
    pool = filled(12, {A: 4, B: 4, C: 4})
    assert pool.pin(A, 4)  # B is now the longest unused
    assert pool.pin(D, 4)
    assert pool.range_of(D) == RowRange(4, 4)
    assert pool.versions == (C, A, D)
    assert pool.take_pending() == [(D, RowRange(4, 4))]


def test_a_wide_adapter_evicts_neighbours_that_together_make_a_hole() -> None:
    pool = filled(12, {A: 2, B: 6, C: 2, D: 2})
    wide = AdapterVersion("wide")
    assert pool.pin(wide, 8)
    assert pool.versions == (C, D, wide)  # A and B were used before C; rows [0, 8)
    assert pool.range_of(wide) == RowRange(0, 8)


def test_pinned_versions_are_never_evicted() -> None:
    pool = filled(8, {A: 4, B: 4})
    assert pool.pin(A, 4)
    assert pool.pin(C, 4)
    assert not pool.pin(D, 4)
    assert pool.versions == (A, C)
    pool.begin_step()
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


class PoolMachine(RuleBasedStateMachine):
    """The model is a row → version list and a use clock; windows are found by trying every start."""

    versions = Bundle("versions")

    @initialize(num_rows=st.integers(1, 24), max_loras=st.none() | st.integers(1, 4))
    def make(self, num_rows: int, max_loras: int | None) -> None:
        self.pool = RowRangePool(num_rows, max_loras=max_loras)
        self.ranks: dict[AdapterVersion, int] = {}
        self.pinned: set[AdapterVersion] = set()
        self.unwritten: set[AdapterVersion] = set()
        self.last_use: dict[AdapterVersion, int] = {}
        self.clock = 0

    def rows(self) -> list[AdapterVersion | None]:
        rows: list[AdapterVersion | None] = [None] * self.pool.num_rows
        for version in self.pool.versions:
            held = self.pool.range_of(version)
            for row in range(held.start, held.end):
                assert rows[row] is None
                rows[row] = version
        return rows

    def cheapest(self, rows: list[AdapterVersion | None], rank: int) -> tuple[int, int] | None:
        """(last use of the newest victim, number of victims) of the best window; None = all blocked by pins."""
        costs = []
        for start in range(len(rows) - rank + 1):
            victims = {version for version in rows[start : start + rank] if version is not None}
            if not victims & self.pinned:
                costs.append((max((self.last_use[v] for v in victims), default=-1), len(victims)))
        return min(costs, default=None)

    @rule(target=versions, name=st.text("xyz", min_size=1, max_size=3), rank=st.integers(1, 12))
    def new_version(self, name: str, rank: int) -> AdapterVersion:
        self.ranks.setdefault(AdapterVersion(name), rank)
        return AdapterVersion(name)

    @rule(version=versions)
    def pin(self, version: AdapterVersion) -> None:
        rank, rows = self.ranks[version], self.rows()
        before = {v: self.pool.range_of(v) for v in self.pool.versions}
        capped = self.pool.max_loras is not None and len(self.pinned | {version}) > self.pool.max_loras
        fits = sum(self.ranks[v] for v in self.pinned | {version}) <= self.pool.num_rows
        cost = self.cheapest(rows, rank)
        got = self.pool.pin(version, rank)
        assert got == (fits and not capped)
        evicted = before.keys() - set(self.pool.versions)
        if not got or version in before:
            assert {v: self.pool.range_of(v) for v in self.pool.versions} == before
        elif cost is not None:
            assert (max((self.last_use[v] for v in evicted), default=-1), len(evicted)) == cost
            assert all(self.pool.range_of(v) == before[v] for v in before.keys() - evicted)
        assert not evicted & self.pinned
        if got and version not in self.pinned:  # a version is used once a step
            moved = {v for v in before if v not in evicted and self.pool.range_of(v) != before[v]}
            self.unwritten = (self.unwritten - evicted) | moved | ({version} - before.keys())
            self.pinned.add(version)
            self.clock += 1
            self.last_use[version] = self.clock

    @rule()
    def begin_step(self) -> None:
        self.pool.begin_step()
        self.pinned.clear()

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

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check_integrity()
        assert self.pool.num_free_rows == self.rows().count(None)
        assert self.pinned <= set(self.pool.versions)
        assert all(self.pool.range_of(v).length == self.ranks[v] for v in self.pool.versions)
        assert list(self.pool.versions) == sorted(self.pool.versions, key=self.last_use.__getitem__)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
