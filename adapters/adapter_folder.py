"""An adapter's folder: which format it holds, and its files, opened once and held open until everything is read.

Only names are trusted to be looked at: a file is opened from the folder downward without following links, must be a
regular file, and has the size that fstat gives. One exception: Hugging Face's hub cache stores a file as a link from
`<repo>/snapshots/<revision>/` to `<repo>/blobs/`, so a link is taken if its target lies inside the folder or inside
that same repo. Knows nothing of JSON fields or tensors.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from adapters.errors import AdapterNotFound, AdapterRefused, RefusalCode
from adapters.lora_config import CONFIG_NAME
from adapters.untrusted_json import shown

WEIGHTS_NAME = "adapter_model.safetensors"
INDEX_NAMES = ("adapter_model.safetensors.index.json", "model.safetensors.index.json")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".nemo", ".pkl")
_TRAINER_PICKLES = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")  # beside an adapter, never one
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "chat_template.jinja")
_MAX_NAMES = 4096


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A regular file held open; `num_bytes` is its size when it was opened, and no more is ever read."""

    name: str
    descriptor: int
    num_bytes: int

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fill `target` from `offset` on. Raises AdapterRefused when the file has become shorter meanwhile."""
        while target:
            count = os.preadv(self.descriptor, [target], offset)
            if count == 0:
                why = f"{self.name} became shorter while it was read"
                raise AdapterRefused(RefusalCode.CORRUPT, why, "Load it again when it is complete", feature=self.name)
            target, offset = target[count:], offset + count

    def read(self, num_bytes: int, offset: int = 0) -> bytes:
        data = bytearray(max(0, min(num_bytes, self.num_bytes - offset)))
        self.read_into(memoryview(data), offset)
        return bytes(data)


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """A folder that holds a config and safetensors weights: `weights` is the one file, or the index of the shards."""

    path: Path
    weights: str
    is_sharded: bool
    tokenizer_files: tuple[str, ...]

    @classmethod
    def find(cls, path: Path) -> "AdapterFolder":
        """Raises AdapterNotFound when there is no adapter at all, AdapterRefused when it is of another format."""
        names, folders = _list(path)
        _refuse_other_formats(names, folders)
        if CONFIG_NAME not in names:
            raise AdapterNotFound(f"no {CONFIG_NAME} in {shown(str(path))}{_hint(path, folders)}")
        indexes = [name for name in INDEX_NAMES if name in names]
        # A full model may lie beside an adapter, so model.*.index.json counts only where no adapter_model.* does.
        candidates = [name for name in (WEIGHTS_NAME, INDEX_NAMES[0]) if name in names] or indexes
        if not candidates:
            raise AdapterNotFound(f"no {WEIGHTS_NAME} or {INDEX_NAMES[0]} in {shown(str(path))}{_hint(path, folders)}")
        if len(candidates) > 1:
            raise AdapterRefused(
                RefusalCode.AMBIGUOUS_LAYOUT,
                f"the folder holds {' and '.join(candidates)}, and only one of them can be meant",
                "Remove the one that is out of date",
                feature=candidates[1],
            )
        tokenizer_files = tuple(name for name in _TOKENIZER_FILES if name in names)
        return cls(path.resolve(), candidates[0], candidates[0] != WEIGHTS_NAME, tokenizer_files)

    @contextmanager
    def open(self, name: str) -> Iterator[OpenFile]:
        """Open one file of the folder. Raises AdapterRefused (adapter_corrupt) when it is absent, or leads outside."""
        root, relative = self._locate(name)
        descriptor = _open_beneath(root, relative, name)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise _bad_file(name, "is not a regular file", "Put the file itself there")
            yield OpenFile(name, descriptor, status.st_size)
        finally:
            os.close(descriptor)

    def _locate(self, name: str) -> tuple[Path, Path]:
        """(root, path below it), links resolved; the walk from the root down then follows none."""
        target = Path(os.path.realpath(self.path / name))
        for root in (self.path, _hub_repo_of(self.path)):
            if root is not None and target.is_relative_to(root):
                return root, target.relative_to(root)
        raise _bad_file(name, "is a symbolic link that leads out of the adapter's folder", "Copy the file itself")


def _list(path: Path) -> tuple[set[str], list[str]]:
    """Names of files (links among them) and of subfolders."""
    names: set[str] = set()
    folders: list[str] = []
    try:
        with os.scandir(path) as entries:
            for entry, _ in zip(entries, range(_MAX_NAMES), strict=False):
                if entry.is_dir():
                    folders.append(entry.name)
                else:
                    names.add(entry.name)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else "not a path"
        raise AdapterNotFound(f"no adapter folder at {shown(str(path))}: {reason}") from None
    return names, sorted(folders)


def _refuse_other_formats(names: set[str], folders: list[str]) -> None:
    has_safetensors = any(name.endswith((".safetensors", *INDEX_NAMES)) for name in names)
    pickles = sorted(n for n in names if n.endswith(_PICKLES) and not n.startswith(_TRAINER_PICKLES))
    if pickles and not has_safetensors and (CONFIG_NAME in names or not folders):
        raise AdapterRefused(
            RefusalCode.PICKLE_REFUSED,
            f"the folder holds {shown(pickles[0])} and no safetensors; reading a pickle runs code that it carries",
            "Load it in PEFT where that is safe, and save it with safe_serialization=True",
            feature=shown(pickles[0]),
        )
    formats = {
        "gguf": (any(n.endswith(".gguf") for n in names), "GGUF LoRA has lost rsLoRA and alpha_pattern"),
        "mlx": ("adapters.safetensors" in names, "MLX-LM's layout and scale differ from PEFT's"),
        "diffusers": ("pytorch_lora_weights.safetensors" in names, "this is a LoRA for an image model"),
    }
    for name, (is_found, why) in formats.items():
        if is_found and WEIGHTS_NAME not in names:
            fix = "Serve the PEFT folder it was made from"
            raise AdapterRefused(RefusalCode.UNSUPPORTED, why, fix, feature=f"format={name}")


def _hint(path: Path, folders: list[str]) -> str:
    candidates = [folder for folder in folders[:64] if (path / folder / CONFIG_NAME).is_file()][:5]
    return f"; it is in the subfolder {', '.join(shown(c) for c in candidates)}" if candidates else ""


def _hub_repo_of(folder: Path) -> Path | None:
    """<repo> when the folder is <repo>/snapshots/<revision> or below it, with <repo>/blobs beside."""
    for parent in folder.parents:
        if parent.name == "snapshots" and (parent.parent / "blobs").is_dir():
            return parent.parent
    return None


def _open_beneath(root: Path, relative: Path, name: str) -> int:
    """Open root/relative one component at a time without following links, so that none put there since can matter."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor: int | None = None
    try:
        descriptor = os.open(root, flags | os.O_DIRECTORY)
        for part in relative.parts[:-1]:
            parent, descriptor = descriptor, os.open(part, flags | os.O_DIRECTORY, dir_fd=descriptor)
            os.close(parent)
        # O_NONBLOCK: opening a FIFO must not wait for a writer.
        parent, descriptor = descriptor, os.open(relative.parts[-1], flags | os.O_NONBLOCK, dir_fd=descriptor)
        os.close(parent)
    except (OSError, IndexError) as error:
        if descriptor is not None:
            os.close(descriptor)
        reason = error.strerror if isinstance(error, OSError) else "it is the folder itself"
        raise _bad_file(name, f"cannot be opened: {reason}", "Check that it is there and readable") from None
    return descriptor


def _bad_file(name: str, why: str, fix: str) -> AdapterRefused:
    return AdapterRefused(RefusalCode.CORRUPT, f"{shown(name)} {why}", fix, feature=shown(name))
