"""A program for the tests, with failing_disk.c preloaded: calls that change the catalogue's files fail, each in turn.

Everything happens in forked processes, which are killed when they are through, so that what the next one opens is what
a crash leaves. Prints how many changes were hit, by what was going on and how it ended; a broken promise is an
AssertionError.
"""

import ctypes
import errno
import gc
import json
import os
import pickle
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count, product
from typing import Literal, TypeVar

from server.lifecycle.catalogue import Catalogue
from server.lifecycle.catalogue_errors import CatalogueUnavailable
from server.lifecycle.catalogue_records import Snapshot
from tests.server.lifecycle.catalogue_world import adapter, check_integrity, version_of, version_record

DISK = ctypes.CDLL(None)  # has the preloaded functions

Outcome = Literal["done", "failed", "unknown"]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Fault:
    """From call number `after` on (half-open, from 0) of `phase` the disk gives `error`, once or for ever.

    `checkpoints`: each commit also moves the log into the file. `dies`: the process, with the catalogue still open.
    """

    phase: str  # open | put | delete | close
    error: int
    sticky: bool
    checkpoints: bool
    dies: bool
    after: int = 0

    def arm(self) -> None:
        DISK.fail_disk(self.after, self.error, self.sticky)


def faults() -> Iterator[Fault]:
    kinds = [(errno.ENOSPC, True), (errno.EIO, False), (errno.EIO, True)]  # what is full stays full
    for phase, kind in product(("open", "put", "delete", "close"), kinds):
        if phase == "close":
            yield Fault(phase, *kind, checkpoints=False, dies=False)
        else:
            yield Fault(phase, *kind, checkpoints=False, dies=True)
            yield Fault(phase, *kind, checkpoints=True, dies=False)


def main(url: str) -> None:
    seen: Counter[str] = Counter()
    stands = _in_child(lambda: _look(url))
    for fault in faults():
        for after in count():
            num_failed, outcome, stands = _attempt(url, replace(fault, after=after), stands)
            if not num_failed:
                break
            seen[f"{fault.phase} {outcome}"] += 1
    print(json.dumps(seen))


def _attempt(url: str, fault: Fault, before: Snapshot) -> tuple[int, Outcome, Snapshot]:
    """One change with one fault in it; then look what is left."""
    num_failed, outcome = _in_child(lambda: _change(url, fault))
    after = _in_child(lambda: _look(url))
    check_integrity(after)
    as_wanted = _number_in(after) == _wanted(before, fault)
    assert as_wanted or outcome != "done", f"{fault}: lost what it acknowledged"
    assert as_wanted or _number_in(after) == _number_in(before), f"{fault}: half done"
    if outcome == "failed" and fault.dies:
        assert after == before, f"{fault}: changed something, and said it did not"
    return num_failed, outcome, after


def _look(url: str) -> Snapshot:
    """As the next server finds it. There is always an adapter to replace or delete."""
    catalogue = Catalogue.open(url)
    if "sql" not in catalogue.snapshot().adapters:
        catalogue.put_adapter(adapter("sql", 1), version_record(1))
    snapshot = catalogue.snapshot()
    catalogue.close()
    return snapshot


def _number_in(snapshot: Snapshot) -> int:
    return int(str(snapshot.adapters["sql"].version), 16)


def _wanted(snapshot: Snapshot, fault: Fault) -> int:
    """A deletion is followed by `_look`, which begins anew."""
    return 1 if fault.phase == "delete" else _number_in(snapshot) + 1


def _change(url: str, fault: Fault) -> tuple[int, Outcome]:
    outcome: Outcome = "done"
    if fault.phase == "open":
        fault.arm()
    try:
        catalogue = Catalogue.open(url)
    except CatalogueUnavailable:
        return DISK.failed_calls(), "failed"
    if fault.phase == "open":
        DISK.disk_is_well()
    before = catalogue.snapshot()
    _set_checkpoints(catalogue, fault.checkpoints)
    try:
        _apply(catalogue, before, fault)
    except CatalogueUnavailable as error:
        outcome = "failed" if error.outcome_known else "unknown"
    if not fault.dies:
        _go_on(catalogue, before, outcome, fault)
    return DISK.failed_calls(), outcome


def _apply(catalogue: Catalogue, before: Snapshot, fault: Fault) -> None:
    if fault.phase in ("put", "delete"):
        fault.arm()
    stands = before.adapters["sql"]
    if fault.phase == "delete":
        catalogue.delete_adapter(stands)
    else:
        number = _number_in(before) + 1
        catalogue.put_adapter(replace(stands, version=version_of(number)), version_record(number))


def _go_on(catalogue: Catalogue, before: Snapshot, outcome: Outcome, fault: Fault) -> None:
    """The disk is well again (or fails while closing): the same process serves on."""
    if fault.phase == "close":
        fault.arm()
    else:
        DISK.disk_is_well()
        if outcome == "failed":
            assert catalogue.snapshot() == before, f"{fault}: the process itself sees a change"
        later = catalogue.put_adapter(adapter("later", 0), version_record(0))
        catalogue.delete_adapter(later)
    catalogue.close()


def _set_checkpoints(catalogue: Catalogue, often: bool) -> None:
    with catalogue._database.read() as connection:  # the one connection that is kept
        connection.exec_driver_sql(f"PRAGMA wal_autocheckpoint = {1 if often else 1000}")


def _in_child(work: Callable[[], Result]) -> Result:
    """What `work` returns in a process of its own, which ends by being killed."""
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            told = pickle.dumps((True, work()))
        except BaseException:
            told = pickle.dumps((False, traceback.format_exc()))
        os.write(sending, told)
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(sending)
    with open(receiving, "rb") as answer:
        is_well, result = pickle.loads(answer.read())
    os.waitpid(child, 0)
    assert is_well, result
    return result  # type: ignore[no-any-return]


if __name__ == "__main__":
    gc.freeze()  # or each fork's collector copies what was imported
    gc.disable()
    main(sys.argv[1])
