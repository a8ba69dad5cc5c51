"""What adapters lie in a folder, by name and fingerprint. Only looks: opens no file, follows what a link leads to.

A direct subfolder with a config is the adapter of that name; one without may be an organisation, whose subfolders with
a config are `org/name`. Names that begin with a dot are for those who copy (a folder is built aside, then renamed).
"""

import hashlib
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from adapters.adapter_folder import INDEX_NAMES
from adapters.lora_config import CONFIG_NAME


@dataclass(frozen=True, slots=True)
class FoundAdapter:
    """The files that a loader would read, as they are now, without having read them."""

    fingerprint: str
    changed_at: float  # seconds since the epoch; when the youngest of the files was last written, moved or linked
    has_weights: bool


@dataclass(frozen=True, slots=True)
class FolderScan:
    """Subfolder → the adapters in it by name. A subfolder that could not be looked at is in `unknown` instead."""

    adapters: Mapping[str, Mapping[str, FoundAdapter]]
    unknown: Mapping[str, str]
    device: int  # of the folder: another file system when this changes


def scan_folder(root: Path, only: Iterable[str] | None = None) -> FolderScan:
    """Look at `root`, or at the subfolders `only`. Raises OSError when the folder itself cannot be looked at."""
    device = root.stat().st_dev
    names = _subfolders(root) if only is None else [name for name in only if not name.startswith(".")]
    adapters: dict[str, Mapping[str, FoundAdapter]] = {}
    unknown: dict[str, str] = {}
    for name in names:
        try:
            if found := _adapters_in(os.fspath(root), name):
                adapters[name] = found
        except OSError as error:
            unknown[name] = error.strerror or str(error)
    return FolderScan(adapters, unknown, device)


def _subfolders(folder: Path | str) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith(".") and _may_be_folder(entry))


def _may_be_folder(entry: os.DirEntry[str]) -> bool:
    """Also what cannot be told: looking into it says why."""
    try:
        return entry.is_dir()
    except OSError:
        return True


def _adapters_in(root: str, name: str) -> dict[str, FoundAdapter]:
    try:
        found = _look(f"{root}/{name}")
        if found is not None:
            return {name: found}
        inner = ((f"{name}/{each}", _look(f"{root}/{name}/{each}")) for each in _subfolders(f"{root}/{name}"))
        return {path: adapter for path, adapter in inner if adapter is not None}
    except (FileNotFoundError, NotADirectoryError):
        return {}  # it went away meanwhile


def _look(folder: str) -> FoundAdapter | None:
    """None when there is no config in `folder`, or no folder."""
    files: list[tuple[str, os.stat_result]] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if _is_read(entry.name) and (status := _status(entry)) is not None:
                    files.append((entry.name, status))
    except (FileNotFoundError, NotADirectoryError):
        return None
    if all(name != CONFIG_NAME for name, _ in files):
        return None
    return FoundAdapter(
        _fingerprint(files),
        max(max(status.st_mtime, status.st_ctime) for _, status in files),
        any(name.endswith(".safetensors") for name, _ in files),
    )


def _is_read(name: str) -> bool:
    return name == CONFIG_NAME or name in INDEX_NAMES or (name.endswith(".safetensors") and not name.startswith("."))


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    try:
        status = entry.stat()
    except FileNotFoundError:  # gone meanwhile, or a link that leads nowhere
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def _fingerprint(files: Iterable[tuple[str, os.stat_result]]) -> str:
    text = "\n".join(f"{name}\0{s.st_ino}\0{s.st_size}\0{s.st_mtime_ns}" for name, s in sorted(files, key=_name))
    return hashlib.blake2b(os.fsencode(text), digest_size=16).hexdigest()


def _name(file: tuple[str, os.stat_result]) -> str:
    return file[0]
