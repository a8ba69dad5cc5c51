"""A team runs every chunk once, with helpers awake, asleep, late or gone."""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest
from numba import carray, types

from adapters.ops import thread_team
from adapters.ops.bf16 import pointer
from adapters.ops.chunk_kernel import chunk_kernel
from adapters.ops.thread_team import KernelArguments, ThreadTeam, current_team, start_team

NUM_CHUNKS = 40
_this_thread = types.ExternalFunction("pthread_self", types.int64())


@chunk_kernel()
def _count(arguments, chunk):  # type: ignore[no-untyped-def]
    """counts[chunk] += 1, after some work, so that helpers get chunks too."""
    counts = carray(pointer(arguments), NUM_CHUNKS, np.int64)
    value = np.float64(chunk)
    for _ in range(300):
        value = np.sqrt(value + 1.0)
    counts[chunk] += 1 + np.int64(value < 0)


@chunk_kernel()
def _note(arguments, chunk):  # type: ignore[no-untyped-def]
    """ran_by[chunk] = this thread, after some work."""
    value = np.float64(chunk)
    for _ in range(300):
        value = np.sqrt(value + 1.0)
    carray(pointer(arguments), NUM_CHUNKS, np.int64)[chunk] = _this_thread() + np.int64(value < 0)


@pytest.fixture
def team() -> Iterator[ThreadTeam]:
    team = ThreadTeam(3)
    yield team
    team.close()


def run(team: ThreadTeam, counts: np.ndarray) -> None:
    team.run(_count.address, KernelArguments(counts), NUM_CHUNKS)


def test_every_chunk_is_run_once_in_every_call(team: ThreadTeam) -> None:
    counts = np.zeros(NUM_CHUNKS, np.int64)
    for _ in range(20):
        with team.step():
            for _ in range(50):
                run(team, counts)
    assert (counts == 1000).all()


def test_outside_a_step_the_caller_works_alone(team: ThreadTeam) -> None:
    counts = np.zeros(NUM_CHUNKS, np.int64)
    run(team, counts)
    assert (counts == 1).all()


def test_a_second_thread_does_not_disturb_the_first(team: ThreadTeam) -> None:
    """Only one thread has the helpers; the other computes by itself, also inside its own step."""
    mine, theirs = np.zeros(NUM_CHUNKS, np.int64), np.zeros(NUM_CHUNKS, np.int64)

    def work() -> None:
        for _ in range(300):
            with team.step():
                run(team, theirs)

    other = threading.Thread(target=work)
    with team.step():
        other.start()
        for _ in range(300):
            run(team, mine)
        other.join()
    assert (mine == 300).all() and (theirs == 300).all()


def test_a_closed_team_goes_on_alone(team: ThreadTeam) -> None:
    counts = np.zeros(NUM_CHUNKS, np.int64)
    team.close()
    with team.step():
        run(team, counts)
    team.close()
    assert (counts == 1).all()
    assert not [thread for thread in threading.enumerate() if thread in team._helpers]


def test_a_step_that_raises_lets_the_helpers_sleep(team: ThreadTeam) -> None:
    with pytest.raises(ZeroDivisionError), team.step():
        raise ZeroDivisionError
    counts = np.zeros(NUM_CHUNKS, np.int64)
    with team.step():
        run(team, counts)
    assert (counts == 1).all()


def workers(team: ThreadTeam, num_calls: int) -> set[int]:
    """The threads that ran a chunk, but for this one."""
    ran_by, found = np.zeros(NUM_CHUNKS, np.int64), set[int]()
    with team.step():
        for _ in range(num_calls):
            team.run(_note.address, KernelArguments(ran_by), NUM_CHUNKS)
            found |= set(ran_by.tolist())
    return found - {threading.get_ident()}


def all_at_work(team: ThreadTeam, num_helpers: int | None = None) -> set[int]:
    """Waits until so many helpers, or every one, have had a chunk, as they must where cores are busy, too."""
    wanted = team.num_threads - 1 if num_helpers is None else num_helpers
    found, deadline = set[int](), time.monotonic() + 30
    while len(found) < wanted and time.monotonic() < deadline:
        found |= workers(team, 20)
    return found


def test_a_lent_core_has_no_helper_on_it(team: ThreadTeam) -> None:
    helpers = all_at_work(team)
    assert len(helpers) == 2
    with team.lent_core():
        workers(team, 1)  # whoever was in a chunk has ended it
        assert len(workers(team, 300)) <= 1
        with team.lent_core(), team.lent_core():  # one more than there are
            workers(team, 1)
            assert workers(team, 300) == set()
    assert all_at_work(team) == helpers


def test_while_a_core_is_lent_the_other_helpers_work_in_every_step(team: ThreadTeam) -> None:
    all_at_work(team)
    ran_by = np.zeros(NUM_CHUNKS, np.int64)
    with team.lent_core():
        for _ in range(6):
            found, deadline = set[int](), time.monotonic() + 10
            with team.step():
                while not found and time.monotonic() < deadline:
                    team.run(_note.address, KernelArguments(ran_by), NUM_CHUNKS)
                    found = set(ran_by.tolist()) - {threading.get_ident()}
            assert found
            time.sleep(0.02)  # the helper is asleep again


def test_many_loads_share_what_is_lent() -> None:
    team = ThreadTeam(4)
    try:
        with ExitStack() as loads:
            for _ in range(10):
                loads.enter_context(team.lent_core())
            assert len(all_at_work(team, 1)) == 1
        assert len(all_at_work(team)) == 3
    finally:
        team.close()


def test_a_core_can_be_lent_from_within_a_step(team: ThreadTeam) -> None:
    counts = np.zeros(NUM_CHUNKS, np.int64)
    with team.step():
        with team.lent_core():
            for _ in range(100):
                run(team, counts)
        run(team, counts)
    assert (counts == 101).all()


def test_the_process_has_one_team() -> None:
    before = current_team().num_threads
    try:
        two = start_team(2)
        assert start_team(2) is two is current_team()
        assert start_team(1) is not two and not two._helpers
    finally:
        start_team(before)


def test_a_team_of_one_starts_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_team.sys, "platform", "darwin")
    assert ThreadTeam(4).num_threads == 1
