"""Prepared adapters on disk, by version: what is loaded once is read back in milliseconds, also after a restart.

One folder for each base and dtype, one file for each version (version_file.py), put there whole or not at all
(durable_file.py). Several threads, and several processes, may use one folder: files are immutable, so readers take no
lock. Knows nothing of names, of who uses a version, or of which ones to give up.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from threading import Lock

import torch

from adapters.adapter_ref import AdapterVersion
from adapters.durable_file import flush_folder, make_folder, remove_leftover, write_file, writing_in
from adapters.errors import VersionDamaged, VersionStoreFailed, VersionStoreFull
from adapters.lora_model import LoRAModel
from adapters.module_names import BaseModules
from adapters.version_file import VersionFile, encode, is_stored, parse_layout, read_version

_SUFFIX = ".safetensors"
_VERSION = re.compile(r"[0-9a-f]{64}")
_BASE_KEY = re.compile(r"[0-9A-Za-z_-]{1,64}")
_NUM_LAYOUTS = 16  # kept parsed: adapters of one kind (rank and modules) share one
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})


def base_key(base: BaseModules, dtype: torch.dtype) -> str:
    """Which prepared adapters fit: the SHA-256 over names and shapes of all that adapters change in the base, and the
    dtype."""
    tables = (base.linears, base.norms, base.experts, base.routers, base.fused)
    parts = [sorted((name, str(shape)) for name, shape in table.items()) for table in tables]
    rest = [str(dtype), str(base.embedding), str(base.head), sorted(base.biased)]
    return hashlib.sha256(json.dumps([rest, parts]).encode()).hexdigest()


class VersionStore:
    """`folder`/`base_key` holds the versions. What was computed from base weights is read back for those with this
    `fingerprint` only. Whatever raises leaves what was stored before as it was.
    """

    def __init__(self, folder: Path, *, base_key: str, fingerprint: str = "") -> None:
        if not _BASE_KEY.fullmatch(base_key):
            raise ValueError(f"{base_key!r} cannot be a folder's name")
        self._folder = folder / base_key
        self._base_key = base_key
        self._fingerprint = fingerprint
        self._layout_from = lru_cache(_NUM_LAYOUTS)(parse_layout)
        self._counting = Lock()
        self._sizes: dict[AdapterVersion, int] = {}  # version → bytes of its file
        self._num_bytes = 0
        with self._failing("open"):
            make_folder(self._folder)
            remove_leftover(self._folder)
            for version in self._listed():
                self._count(version)

    @property
    def num_bytes(self) -> int:
        """Of all files, as last seen: what another process stored or removed counts from when it is met here."""
        return self._num_bytes

    def versions(self) -> tuple[AdapterVersion, ...]:
        """Those on disk now, in alphabetical order. Raises VersionStoreFailed."""
        with self._failing("list"):
            return tuple(sorted(self._listed()))

    def __contains__(self, version: object) -> bool:
        return isinstance(version, str) and bool(_VERSION.fullmatch(version)) and self._count(AdapterVersion(version))

    def put(self, model: LoRAModel) -> int:
        """Store the model for good; the bytes it has on disk. One that is there whole is not written again.

        Raises VersionStoreFull, VersionStoreFailed.
        """
        path = self._path(model.version)
        file = encode(model, base_key=self._base_key)
        try:
            with self._failing("store", file.num_bytes):
                self._put(path, file)
        finally:
            self._count(model.version)
        return file.num_bytes

    def read(self, version: AdapterVersion) -> LoRAModel:
        """The model that was put. Raises KeyError when it is not there, VersionDamaged, VersionStoreFailed."""
        if version not in self:
            raise KeyError(version)
        try:
            with self._failing("read"):
                return self._read(version)
        except VersionDamaged as error:
            raise VersionDamaged(f"{self._path(version)}: {error}. Load the adapter again from its source") from error

    def remove(self, version: AdapterVersion) -> int:
        """Bytes given back: 0 when it was not there. Who reads it at that moment reads it to its end."""
        if version not in self:
            return 0
        before = self._sizes.get(version, 0)
        with self._failing("remove"), suppress(FileNotFoundError):
            os.unlink(self._path(version))
        return 0 if version in self else before

    def check_integrity(self) -> None:
        """What is counted is what is there, while no other process writes."""
        with self._counting:
            assert self._num_bytes == sum(self._sizes.values())
            assert self._sizes == {version: self._path(version).stat().st_size for version in self._listed()}

    def _path(self, version: AdapterVersion) -> Path:
        if not _VERSION.fullmatch(version):
            raise ValueError(f"{version!r} is no version: 64 hexadecimal digits")
        return self._folder / f"{version}{_SUFFIX}"

    def _listed(self) -> Iterator[AdapterVersion]:
        for name in os.listdir(self._folder):
            version = name.removesuffix(_SUFFIX)
            if version != name and _VERSION.fullmatch(version):
                yield AdapterVersion(version)

    def _count(self, version: AdapterVersion) -> bool:
        """Set what is counted to what is there; whether there is a file."""
        with self._counting:
            try:
                size = os.stat(self._path(version)).st_size
            except OSError:
                self._num_bytes -= self._sizes.pop(version, 0)
                return False
            self._num_bytes += size - self._sizes.get(version, 0)
            self._sizes[version] = size
            return True

    def _put(self, path: Path, file: VersionFile) -> None:
        make_folder(self._folder)
        with writing_in(self._folder):
            if _holds(path, file):
                flush_folder(self._folder)  # whoever put it there may have been killed before it did
            else:
                write_file(path, (file.header, file.data))

    def _read(self, version: AdapterVersion) -> LoRAModel:
        try:
            with _opened(self._path(version)) as descriptor:
                return read_version(
                    descriptor,
                    version,
                    base_key=self._base_key,
                    layout_from=self._layout_from,
                    fingerprint=self._fingerprint,
                )
        except FileNotFoundError:  # removed since it was seen
            self._count(version)
            raise KeyError(version) from None

    @contextmanager
    def _failing(self, what: str, num_bytes: int = 0) -> Iterator[None]:
        """Of a system call that failed say where, why, and what to do."""
        try:
            yield
        except OSError as error:
            needed = (
                f", where {num_bytes} bytes are needed and {_free_bytes(self._folder)} are free" if num_bytes else ""
            )
            code = errno.errorcode.get(error.errno or 0, "no code")
            why = f"cannot {what} adapters in {self._folder}{needed}: {error.strerror} ({code})"
            if error.errno in _NO_ROOM:
                raise VersionStoreFull(f"{why}. Make room on that disk, raise its quota, or unload adapters") from error
            way_out = "Check the disk, and that the server's user may read and write the folder"
            raise VersionStoreFailed(f"{why}. {way_out}") from error


def _holds(path: Path, file: VersionFile) -> bool:
    try:
        with _opened(path) as descriptor:
            return is_stored(descriptor, file)
    except FileNotFoundError:
        return False


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe is no reason to wait
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _free_bytes(folder: Path) -> int:
    try:
        status = os.statvfs(folder)
    except OSError:
        return 0
    return status.f_bavail * status.f_frsize
