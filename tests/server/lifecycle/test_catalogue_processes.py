"""Several processes on one catalogue: nothing is lost between them, and nothing with one that is killed."""

import os
import random
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection

from server.lifecycle.catalogue import Catalogue
from tests.server.lifecycle.catalogue_world import Follower, adapter, check_integrity
from tests.server.lifecycle.catalogue_writers import (
    Move,
    change_until_killed,
    count_up,
    fork_server,
    standing,
    standing_in,
)

KILLS = int(os.environ.get("CATALOGUE_KILLS", "20"))
NUM_WRITERS = 3
TIMES = 12
SHARED = ["a", "b"]
JOIN_SECONDS = 900  # a machine may be stopped for a while


def test_writers_at_once_lose_nothing_and_a_poller_misses_nothing(catalogue: Catalogue, catalogue_url: str) -> None:
    for name in SHARED:
        catalogue.put_adapter(adapter(name))
    follower = Follower(catalogue.snapshot())
    context = fork_server()
    writers = [
        context.Process(target=count_up, args=(catalogue_url, number, SHARED, TIMES)) for number in range(NUM_WRITERS)
    ]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        follower.apply(catalogue.changes(follower.sequence))
    for writer in writers:
        writer.join(JOIN_SECONDS)
        assert writer.exitcode == 0
    follower.apply(catalogue.changes(follower.sequence))
    snapshot = catalogue.snapshot()
    check_integrity(snapshot)
    follower.check_equals(snapshot)
    assert {name: snapshot.adapters[name].priority for name in SHARED} == dict.fromkeys(SHARED, NUM_WRITERS * TIMES)
    own = {f"own {writer} {number}" for writer in range(NUM_WRITERS) for number in range(0, TIMES, 2)}
    assert snapshot.adapters.keys() == {*own, *SHARED}


def test_many_may_open_a_new_catalogue_at_once(catalogue_url: str) -> None:
    """Whoever is first makes the tables; the others wait."""
    barrier = threading.Barrier(8)
    opened: list[Catalogue] = []

    def open_at_once() -> None:
        barrier.wait()
        opened.append(Catalogue.open(catalogue_url))

    threads = [threading.Thread(target=open_at_once) for _ in range(barrier.parties)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == barrier.parties
    opened[0].put_adapter(adapter("sql"))
    for catalogue in opened:
        assert catalogue.snapshot().adapters.keys() == {"sql"}
        catalogue.close()


def test_a_killed_writer_loses_nothing_it_acknowledged(
    catalogue_url: str, open_catalogue: Callable[[str], Catalogue]
) -> None:
    """Each kill leaves the catalogue as it was after the last change told of, or after the one under way, wholly."""
    reader = open_catalogue(catalogue_url)
    follower = Follower(reader.snapshot())
    moves: list[Move] = []
    num_cut_off = 0
    choice = random.Random(KILLS)
    for kill in range(KILLS):
        done, under_way = _moves_until_killed(catalogue_url, kill + 1, choice.uniform(0, 0.04))
        moves += done
        _wait_for_the_writer_before(reader)
        found = standing_in(reader.snapshot())
        if under_way is not None and found != standing(moves):
            moves.append(under_way)
            num_cut_off += 1
        assert found == standing(moves)
        check_integrity(reader.snapshot())
        follower.apply(reader.changes(follower.sequence))
        follower.check_equals(reader.snapshot())
        fresh = Catalogue.open(catalogue_url)
        assert standing_in(fresh.snapshot()) == found
        fresh.close()
    assert len(moves) - num_cut_off >= KILLS  # or nothing was tested


def _moves_until_killed(url: str, seed: int, seconds: float) -> tuple[list[Move], Move | None]:
    """The moves a writer told to be done before it was killed `seconds` after its first, and the one it was at."""
    context = fork_server()
    receiving, sending = context.Pipe(duplex=False)
    writer = context.Process(target=change_until_killed, args=(url, seed, sending))
    writer.start()
    sending.close()
    told = [receiving.recv(), receiving.recv()]
    timer = threading.Timer(seconds, writer.kill)
    timer.start()
    told += _all_of(receiving)
    writer.join()
    timer.join()
    done = [move for word, move in told if word == "done"]
    return done, told[-1][1] if told[-1][0] == "tries" else None


class _Undone(Exception):
    pass


def _wait_for_the_writer_before(catalogue: Catalogue) -> None:
    """A PostgreSQL server may still be at the last commit of a client that is dead; who then writes waits for it."""
    with suppress(_Undone), catalogue._database.write():
        raise _Undone


def _all_of(receiving: Connection) -> list[tuple[str, Move]]:
    told = []
    with suppress(EOFError, OSError):  # cut off within a word, too
        while True:
            told.append(receiving.recv())
    return told


def test_a_hung_writer_keeps_nobody_from_reading(catalogue: Catalogue, replica: Catalogue) -> None:
    before = catalogue.put_adapter(adapter("sql"))
    with catalogue._database.write():
        assert replica.snapshot().adapters == {"sql": before}
        assert replica.changes(before.revision).adapters == {}
