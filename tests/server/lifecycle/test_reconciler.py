"""One owner's names: brought to their goals, retried with patience, and nobody else's touched."""

import asyncio
import logging
import math

import pytest

from adapters.errors import AdapterCapacity, AdapterRefused, RefusalCode
from server.lifecycle.control import WantedAdapter
from server.lifecycle.reconciler import Deeds, Reconciler
from tests.server.lifecycle.fake_control import FakeControl, until

pytestmark = pytest.mark.asyncio


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def _reconciler(control: FakeControl, clock: _Clock, **standing: str | None) -> Reconciler[str]:
    async def apply(name: str, goal: str) -> None:
        await control.apply(WantedAdapter(name=name, source=goal, managed_by="folder"))

    deeds = Deeds(
        owner="folder",
        kind="adapter",
        apply=apply,
        remove=control.remove,
        owner_of=control.owner_of,
        is_final=lambda error: isinstance(error, AdapterRefused),
    )
    return Reconciler(deeds, standing, clock=clock)


async def _aim(reconciler: Reconciler[str], **goals: str) -> None:
    reconciler.aim(goals)
    await reconciler.idle()
    await asyncio.sleep(0)  # callbacks of tasks
    await reconciler.idle()


async def test_goals_are_applied_once_and_removed_when_unwanted() -> None:
    control = FakeControl()
    reconciler = _reconciler(control, _Clock())
    await _aim(reconciler, a="1", b="1")
    await _aim(reconciler, a="1", b="2")
    assert sorted(control.calls) == [("apply", "a"), ("apply", "b"), ("apply", "b")]
    assert control.records["b"].source == "2"
    await _aim(reconciler, b="2")
    assert set(control.records) == {"b"}
    assert reconciler.standing == {"b": "2"}


async def test_standing_at_the_start_is_not_applied_again_but_removed_when_unwanted() -> None:
    control = FakeControl()
    for name in ("kept", "gone"):
        control.own(name, "folder")
    reconciler = _reconciler(control, _Clock(), kept="1", gone="1")
    await _aim(reconciler, kept="1")
    assert control.calls == [("remove", "gone")]


@pytest.mark.parametrize("owner", ["api", "file", "start"])
async def test_a_name_of_another_owner_is_neither_replaced_nor_removed(owner: str) -> None:
    control, clock = FakeControl(), _Clock()
    control.own("sql", owner)
    reconciler = _reconciler(control, clock)
    await _aim(reconciler, sql="mine")
    assert owner in reconciler.failures["sql"]
    await _aim(reconciler)
    assert control.calls == []
    assert control.records["sql"].managed_by == owner
    assert reconciler.failures == {}
    assert reconciler.next_retry == math.inf


async def test_a_name_taken_over_by_another_owner_meanwhile_is_left_to_it() -> None:
    control = FakeControl()
    reconciler = _reconciler(control, _Clock())
    await _aim(reconciler, sql="1")
    control.own("sql", "api")
    await _aim(reconciler)
    assert control.times("remove", "sql") == 0
    assert "sql" in control.records


async def test_a_name_loaded_on_a_miss_is_taken_over() -> None:
    control = FakeControl()
    control.own("sql", "miss")
    await _aim(_reconciler(control, _Clock()), sql="mine")
    assert control.records["sql"].managed_by == "folder"


async def test_a_name_freed_by_its_owner_is_applied_after_a_while() -> None:
    control, clock = FakeControl(), _Clock()
    control.own("sql", "api")
    reconciler = _reconciler(control, clock)
    await _aim(reconciler, sql="mine")
    del control.records["sql"]
    clock.now = reconciler.next_retry
    await _aim(reconciler, sql="mine")
    assert control.records["sql"].managed_by == "folder"


async def test_failures_are_retried_later_and_later_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    control, clock = FakeControl(), _Clock()
    control.faults["a"] = AdapterCapacity("full")
    reconciler = _reconciler(control, clock)
    waits = []
    with caplog.at_level(logging.WARNING):
        for _ in range(12):
            await _aim(reconciler, a="1")
            await _aim(reconciler, a="1")  # too early: nothing happens
            waits.append(reconciler.next_retry - clock.now)
            clock.now = reconciler.next_retry
    assert control.times("apply", "a") == 12
    assert waits == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300]
    assert len(caplog.records) == 1
    del control.faults["a"]
    await _aim(reconciler, a="1")
    assert reconciler.failures == {}
    assert reconciler.next_retry == math.inf


async def test_a_retry_that_is_under_way_is_not_due_again() -> None:
    """Else whoever waits for the next retry would spin until it has ended."""
    control, clock = FakeControl(), _Clock()
    control.faults["a"] = AdapterCapacity("full")
    reconciler = _reconciler(control, clock)
    await _aim(reconciler, a="1")
    control.gates["a"] = gate = asyncio.Event()
    clock.now = reconciler.next_retry
    reconciler.aim({"a": "1"})
    await until(lambda: control.times("apply", "a") == 2)
    assert reconciler.next_retry == math.inf
    gate.set()
    await reconciler.idle()
    await until(lambda: reconciler.next_retry == clock.now + 2.0)


async def test_a_final_failure_waits_for_another_goal() -> None:
    control, clock = FakeControl(), _Clock()
    control.faults["a"] = AdapterRefused(RefusalCode.CORRUPT, "why", "fix")
    reconciler = _reconciler(control, clock)
    await _aim(reconciler, a="1")
    clock.now = 1e9
    await _aim(reconciler, a="1")
    assert control.times("apply", "a") == 1
    del control.faults["a"]
    await _aim(reconciler, a="2")
    assert control.records["a"].source == "2"


async def test_one_that_hangs_stops_no_other_and_no_other_goal_of_its_own_is_lost() -> None:
    control = FakeControl()
    control.gates["slow"] = gate = asyncio.Event()
    reconciler = _reconciler(control, _Clock())
    reconciler.aim({"slow": "1", "a": "1"})
    await until(lambda: "a" in control.records)
    reconciler.aim({"slow": "2"})
    await until(lambda: "a" not in control.records)
    assert reconciler.next_retry == math.inf
    gate.set()
    await until(lambda: "slow" in control.records and control.records["slow"].source == "2")
    await reconciler.close()


async def test_a_name_an_operator_removed_stays_away_until_its_goal_changes() -> None:
    control = FakeControl()
    reconciler = _reconciler(control, _Clock())
    await _aim(reconciler, a="1")
    del control.records["a"]
    await _aim(reconciler, a="1")
    assert "a" not in control.records
    await _aim(reconciler, a="2")
    assert "a" in control.records


async def test_what_failed_to_load_is_removed_if_it_left_a_record() -> None:
    control = FakeControl()
    control.faults["a"] = AdapterCapacity("full")
    reconciler = _reconciler(control, _Clock())
    await _aim(reconciler, a="1")
    control.own("a", "folder")  # the control keeps the record of a failed load
    await _aim(reconciler)
    assert control.records == {}


async def test_an_error_nobody_foresaw_is_logged_with_its_trace_and_stops_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    control = FakeControl()
    control.faults["a"] = KeyError("bug")
    reconciler = _reconciler(control, _Clock())
    with caplog.at_level(logging.WARNING):
        await _aim(reconciler, a="1", b="1")
    assert set(control.records) == {"b"}
    assert caplog.records[0].exc_info


async def test_close_cancels_what_is_under_way() -> None:
    control = FakeControl()
    control.gates["slow"] = asyncio.Event()
    reconciler = _reconciler(control, _Clock())
    reconciler.aim({"slow": "1"})
    await until(lambda: control.times("apply", "slow") == 1)
    await reconciler.close()
    assert control.records == {}
