"""Which files the kernel saw being opened below a folder: inotify, so that no code under test can hide one."""

import ctypes
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_IN_ACCESS, _IN_OPEN = 0x1, 0x20
_EVENT = struct.Struct("iIII")
_libc = ctypes.CDLL(None, use_errno=True)


class Opens:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def seen(self) -> list[str]:
        """Names opened or read since the last call; '' is the folder itself."""
        names = []
        try:
            data = os.read(self._descriptor, 1 << 16)
        except BlockingIOError:
            return []
        while data:
            *_, length = _EVENT.unpack_from(data)
            names.append(data[_EVENT.size : _EVENT.size + length].rstrip(b"\0").decode())
            data = data[_EVENT.size + length :]
        return names


@contextmanager
def watched(*folders: Path) -> Iterator[Opens]:
    descriptor = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    assert descriptor >= 0
    try:
        for folder in folders:
            assert _libc.inotify_add_watch(descriptor, os.fsencode(folder), _IN_OPEN | _IN_ACCESS) >= 0
        yield Opens(descriptor)
    finally:
        os.close(descriptor)
