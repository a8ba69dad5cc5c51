"""A file that is there whole and for good, or not at all: written aside, flushed, renamed, its folder flushed.

One writer a folder at a time, in all processes, by a lock that the kernel takes back from a dead one. So there is one
name for what is being written, and what a killed writer left is replaced by the next. Everything is its owner's alone
(0700, 0600). Knows nothing of what the bytes are; every failure is the OSError it was.
"""

import errno
import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ASIDE = ".writing"
"""The file being written. No file that is whole has this name."""
_LOCK = ".lock"
_MAX_WRITE = 16 << 20  # bytes of one call; the kernel takes 2 GiB at most, and this is whole pages
_PAGE = 4096
_PAST_CACHE: int = getattr(os, "O_DIRECT", 0)  # 0: not on this system


def make_folder(folder: Path) -> None:
    """The folder and those above it that are missing, each there for good."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    with suppress(FileExistsError):  # another process was first; anything but a folder fails at its first use
        os.mkdir(folder, 0o700)
    flush_folder(folder.parent)


@contextmanager
def writing_in(folder: Path, *, wait: bool = True) -> Iterator[bool]:
    """Be the folder's one writer; false when another is and we do not `wait`."""
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield _lock(descriptor, wait)
    finally:
        with suppress(OSError):  # closing alone would not do while a process forked meanwhile has it open too
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def remove_leftover(folder: Path) -> None:
    """Remove what a killed writer left; a living one's stays."""
    with writing_in(folder, wait=False) as alone:
        if alone:
            _remove(folder / ASIDE)


def write_file(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Put `path` there or replace it, for good when this returns. Only within `writing_in(path.parent)`.

    When it raises, what was there is there, or it is replaced by the whole new file, which then may not outlast a power
    failure.
    """
    aside, replaces = path.with_name(ASIDE), path.exists()
    try:
        _write(aside, parts)
        os.rename(aside, path)
    except BaseException:
        _try_remove(aside)
        raise
    try:
        flush_folder(path.parent)
    except BaseException:
        if not replaces:
            _try_remove(path)
        raise


def flush_folder(folder: Path) -> None:
    """Make names in the folder outlast a power failure."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, wait: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _write(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    _remove(path)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        for part in parts:
            rest = _write_pages(descriptor, memoryview(part).cast("B"))
            while rest:
                rest = rest[os.write(descriptor, rest[:_MAX_WRITE]) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_pages(descriptor: int, rest: memoryview) -> memoryview:
    """Write whole pages straight from where they are; what is left of `rest`, all of it where that is not possible.

    Through the system's cache the processor copies every byte into a page that has to be found first: a tenth of the
    time of a fast disk, but time that others compute in. Not possible is what begins at no page in memory or in the
    file, or a file system that cannot.
    """
    if not _PAST_CACHE or len(rest) < _PAGE:
        return rest
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | _PAST_CACHE)
        while pages := len(rest) // _PAGE:
            rest = rest[os.write(descriptor, rest[: min(pages * _PAGE, _MAX_WRITE)]) :]
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
    return rest


def _remove(path: Path) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


def _try_remove(path: Path) -> None:
    with suppress(OSError):  # the failure that led here is the one to tell; the next writer removes what is left
        os.unlink(path)
