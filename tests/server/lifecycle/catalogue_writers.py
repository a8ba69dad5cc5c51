"""What other processes do to a catalogue in the tests: count up together, change at random until killed.

They are forked from a server that has imported this module once, so that starting one takes milliseconds.
"""

import multiprocessing
import os
import pwd
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext

from server.lifecycle.catalogue import Catalogue
from server.lifecycle.catalogue_errors import CatalogueConflict
from server.lifecycle.catalogue_records import AdapterRecord, AliasRecord, AliasTarget, Snapshot
from tests.server.lifecycle.catalogue_world import adapter, version_of, version_record

NUM_NAMES = 6
LED_TO = "led to"  # the adapter that every alias leads to, which stays


def fork_server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def count_up(url: str, writer: int, shared: list[str], times: int) -> None:
    """Raise each shared adapter's priority by one `times` times, as whoever comes first, and leave own names behind."""
    catalogue = Catalogue.open(url)
    choice = random.Random(writer)
    for number in range(times):
        own = catalogue.put_adapter(adapter(f"own {writer} {number}", number), version_record(number))
        if number % 2:
            catalogue.delete_adapter(own)
        for name in choice.sample(shared, len(shared)):
            _raise_priority(catalogue, name)
    catalogue.close()


def _raise_priority(catalogue: Catalogue, name: str) -> None:
    while True:
        record = catalogue.snapshot().adapters[name]
        try:
            catalogue.put_adapter(replace(record, priority=record.priority + 1))
        except CatalogueConflict:
            continue
        return


@dataclass(frozen=True)
class Move:
    """One random change. A `number` makes every field of the record, so that half a record would show."""

    action: str  # load | alias | delete
    name: str
    number: int


def change_until_killed(url: str, seed: int, told: Connection) -> None:
    """Tells of every move before it is tried and when it is done."""
    catalogue = Catalogue.open(url)
    if LED_TO not in catalogue.snapshot().adapters:
        catalogue.put_adapter(adapter(LED_TO, 0), version_record(0))
    choice = random.Random(seed)
    number = seed * 1_000_000
    while True:
        snapshot = catalogue.snapshot()
        number += 1
        move = _random_move(choice, snapshot, number)
        told.send(("tries", move))
        apply_move(catalogue, snapshot, move)
        told.send(("done", move))


def _random_move(choice: random.Random, snapshot: Snapshot, number: int) -> Move:
    name = str(choice.randrange(NUM_NAMES))
    if name in snapshot.adapters or name in snapshot.aliases:
        action = "delete" if choice.random() < 0.3 else "alias" if name in snapshot.aliases else "load"
    else:
        action = choice.choice(["load", "alias"])
    return Move(action, name, number)


def apply_move(catalogue: Catalogue, snapshot: Snapshot, move: Move) -> None:
    adapter_stands, alias_stands = snapshot.adapters.get(move.name), snapshot.aliases.get(move.name)
    if move.action == "delete" and adapter_stands:
        catalogue.delete_adapter(adapter_stands)
    elif move.action == "delete" and alias_stands:
        catalogue.delete_alias(alias_stands)
    elif move.action == "alias":
        revision = alias_stands.revision if alias_stands else 0
        catalogue.put_alias(replace(moved_alias(move), revision=revision))
    else:
        previous = (adapter_stands.version,) if adapter_stands and adapter_stands.version else ()
        revision = adapter_stands.revision if adapter_stands else 0
        record = replace(moved_adapter(move), previous=previous, revision=revision)
        catalogue.put_adapter(record, version_record(move.number))


def tell_what_fails_for_nobody(url: str, told: Connection) -> None:
    """As a user without rights: root may do everything."""
    if os.getuid() == 0:
        nobody = pwd.getpwnam("nobody")
        os.setgid(nobody.pw_gid)
        os.setuid(nobody.pw_uid)
    try:
        catalogue = Catalogue.open(url)
        catalogue.put_adapter(adapter("later"))
        told.send(("", "nothing failed"))
    except Exception as error:
        told.send((type(error).__name__, str(error)))


def moved_adapter(move: Move) -> AdapterRecord:
    return adapter(move.name, move.number, priority=move.number, pending=f"/{move.number}", created_at=1.0)


def moved_alias(move: Move) -> AliasRecord:
    return AliasRecord(name=move.name, targets=(AliasTarget(adapter=LED_TO, weight=float(move.number)),))


def standing(moves: Iterable[Move]) -> dict[str, int]:
    """Name → number of the move that made what stands there, after `moves`."""
    names: dict[str, int] = {}
    for move in moves:
        if move.action == "delete":
            del names[move.name]
        else:
            names[move.name] = move.number
    return names


def standing_in(snapshot: Snapshot) -> dict[str, int]:
    """The same out of a catalogue; fails where a record is not wholly of one move."""
    names: dict[str, int] = {}
    for name, record in snapshot.adapters.items():
        if name == LED_TO:
            continue
        move = Move("load", name, record.priority)
        plain = replace(record, previous=(), revision=0, updated_at=0.0)
        assert plain == moved_adapter(move)
        assert record.version == version_of(move.number)
        names[name] = move.number
    for name, alias in snapshot.aliases.items():
        move = Move("alias", name, int(alias.targets[0].weight))
        assert replace(alias, revision=0) == moved_alias(move)
        names[name] = move.number
    return names
