"""Plans of what to read next: every part of every stretch is asked for, in order, and nothing outside them."""

from typing import Any

import numba.extending
import numpy as np
import numpy.typing as npt
import pytest
from numba import njit, types

from adapters.ops.look_ahead import (
    DISTANCE,
    UNIT,
    addressing,
    append,
    begin_plan,
    clear,
    fetch,
    plan_fields,
    take,
)

_intrinsic: Any = numba.extending.intrinsic
FAR = 1 << 40


@_intrinsic
def asked_at(_typing: Any, plan: Any, offset: Any) -> Any:
    """Where kernels ask at an offset of the bytes taken, instead of asking there."""
    return types.int64(types.int64, types.int64), lambda _c, builder, _s, args: addressing(builder, args[0])(args[1])


@njit
def made(stretches: Any) -> Any:
    plan = np.full(plan_fields(len(stretches)) + 1, 7, np.int64)
    clear(plan)
    for i in range(len(stretches)):
        append(plan, stretches[i, 0], stretches[i, 1])
    return plan


@njit
def begun(plan: Any, is_fetched: bool) -> None:
    begin_plan(plan, is_fetched)


@njit
def taken(plan: Any, num_bytes: int) -> Any:
    take(plan, num_bytes)
    return [asked_at(plan.ctypes.data, offset) for offset in range(0, num_bytes, UNIT)]


def units(stretches: list[tuple[int, int]]) -> list[int]:
    return [address + at for address, num_bytes in stretches for at in range(0, num_bytes, UNIT)]


def plan_of(stretches: list[tuple[int, int]]) -> npt.NDArray[np.int64]:
    plan: npt.NDArray[np.int64] = made(np.array(stretches, np.int64).reshape(-1, 2))
    begun(plan, True)  # nothing is there to be read
    return plan


@pytest.mark.parametrize("step", [UNIT, 3 * UNIT, 18 * UNIT])
def test_all_stretches_are_asked_for_in_order(step: int) -> None:
    """The second lies before the first, one is empty, one is no multiple of a unit."""
    stretches = [
        (FAR, DISTANCE + 5 * UNIT),
        (FAR >> 1, 40 * UNIT),
        (77, 0),
        (FAR + 64, 20 * UNIT - 64),
        (64, 30 * UNIT),
    ]
    want = units(stretches)[DISTANCE // UNIT :]
    plan = plan_of(stretches)
    got = [address for _ in range(0, len(want) * UNIT, step) for address in taken(plan, step)]
    assert got[: len(want)] == want
    assert set(got[len(want) :]) <= {want[-1]}
    assert set(taken(plan, step)) == {want[-1]}


def test_one_request_reaches_into_the_next_stretch_only() -> None:
    first, second, third = stretches = [(FAR, DISTANCE + UNIT), (64, 2 * UNIT), (FAR >> 1, 9 * UNIT)]
    plan = plan_of(stretches)
    assert taken(plan, 4 * UNIT) == [first[0] + DISTANCE, second[0], second[0] + UNIT, second[0] + UNIT]
    assert taken(plan, 2 * UNIT) == units([third])[:2]


@pytest.mark.parametrize("sizes", [(UNIT,), (UNIT, 100, 3 * UNIT), (0, UNIT), ()])
def test_the_beginning_may_reach_over_all_stretches(sizes: tuple[int, ...]) -> None:
    memory = np.zeros((max(1, len(sizes)), DISTANCE), np.uint8)
    stretches = [(row.ctypes.data, size) for row, size in zip(memory, sizes, strict=False)]
    plan = made(np.array(stretches, np.int64).reshape(-1, 2))
    begun(plan, False)
    assert plan[-1] == 7  # not written beyond its end
    if sizes:
        assert set(taken(plan, 2 * UNIT)) == {units(stretches)[-1]}


def test_asking_changes_nothing_and_reads_no_forbidden_memory() -> None:
    plan = plan_of([(64, 4 * DISTANCE), (FAR, DISTANCE)])  # addresses of nothing
    before = plan.copy()

    @njit
    def ask(plan: Any) -> None:
        fetch(plan.ctypes.data, DISTANCE)

    ask(plan)
    assert np.array_equal(plan, before)
