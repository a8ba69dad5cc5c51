"""A folder that is made once and then only read: written aside, flushed, renamed. Knows nothing of what is in it.

Two processes never build the same folder at once, and a build that was killed leaves nothing that could be taken for a
whole folder: what it left is removed by the next build.
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def folder_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Return `target`, first made by `build(empty folder)` when it is not there yet."""
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(_beside(target, "lock")):
        if not target.is_dir():  # another process may have built it while we waited
            _build_aside(target, build)
    return target


def _build_aside(target: Path, build: Callable[[Path], None]) -> None:
    aside = _beside(target, "partial")
    shutil.rmtree(aside, ignore_errors=True)  # of a process that died: we hold the lock, so nobody is writing it
    aside.mkdir()
    try:
        build(aside)
        _flush(aside)
        aside.rename(target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    _flush_entry(target.parent)


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(f".{target.name}.{suffix}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`; the kernel gives it back when the process dies."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _flush(folder: Path) -> None:
    """Every file's bytes, then every folder's entries, before the rename makes them visible."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            _flush_entry(Path(parent, name))
        _flush_entry(Path(parent))


def _flush_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
