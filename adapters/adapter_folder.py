"""An adapter's folder: which format it holds, and its files, all reached from one descriptor held open meanwhile.

The folder is listed and its files are opened from that descriptor (`adapters/open_folder.py`), so that a folder put in
its place during a load is never mixed with it. A file must be regular and has the size that fstat gives. A link is
taken if it stays within the folder. One exception: Hugging Face's hub cache stores a file as a link from
`<repo>/snapshots/<revision>/` to `<repo>/blobs/`, and that one may be a link to `<cache>/blobs/`. Knows nothing of JSON
fields or tensors.
"""

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from adapters.errors import AdapterNotFound, AdapterRefused, RefusalCode
from adapters.lora_config import CONFIG_NAME
from adapters.open_folder import LeadsOutside, NotAFile, OpenFolder, Parts
from adapters.untrusted_json import shown

WEIGHTS_NAME = "adapter_model.safetensors"
MLX_WEIGHTS_NAME = "adapters.safetensors"
INDEX_NAMES = ("adapter_model.safetensors.index.json", "model.safetensors.index.json")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".nemo", ".pkl")
_TRAINER_PICKLES = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")  # beside an adapter, never one
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "chat_template.jinja"),
    *("tokenizer.model", "vocab.json"),
)
_MAX_NAMES = 4096
_SHARED_BLOBS = "blobs/.huggingface-shared-blobs"  # marks a hub cache whose repos share files


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
    """A folder that holds a config and safetensors weights: `weights` is the one file, or the index of the shards.

    Holds `folder` open until it is closed. `within` are the folders that its files may lie in, below the boundary;
    `refuse_hard_links` also refuses a file that has a second name, which may be anywhere.
    """

    folder: OpenFolder
    weights: str
    is_sharded: bool
    tokenizer_files: tuple[str, ...]
    within: tuple[Parts, ...]
    refuse_hard_links: bool = False

    @classmethod
    def find(cls, path: Path) -> "AdapterFolder":
        """The adapter in the folder at `path`, which is trusted: links in it are followed.

        Raises AdapterNotFound when there is no adapter at all, AdapterRefused when it is of another format.
        """
        try:
            real = path.resolve()
            boundary = _boundary_of(real)
            with OpenFolder.at(boundary) as outer:
                folder = outer.descend(real.relative_to(boundary).as_posix())
        except (OSError, ValueError, RuntimeError) as error:  # ValueError: a NUL in the path; RuntimeError: a ring
            reason = error.strerror if isinstance(error, OSError) else "not a path"
            raise AdapterNotFound(f"no adapter folder at {shown(str(path))}: {reason}") from None
        return cls.within_folder(folder)

    @classmethod
    def within_folder(cls, folder: OpenFolder, *, refuse_hard_links: bool = False) -> "AdapterFolder":
        """The adapter in a folder that is open, which it closes: when it is closed, or now if it raises.

        Raises AdapterNotFound and AdapterRefused as `find` does.
        """
        try:
            names, folders = _list(folder)
            weights = _weights_among(names, folders, folder)
        except BaseException:
            folder.close()
            raise
        tokenizer_files = tuple(name for name in TOKENIZER_FILES if name in names)
        within = (folder.parts, *_hub_folders_of(folder))
        return cls(folder, weights, weights in INDEX_NAMES, tokenizer_files, within, refuse_hard_links)

    @property
    def path(self) -> Path:
        return self.folder.path

    @contextmanager
    def open(self, name: str) -> Iterator[OpenFile]:
        """Open one file of the folder. Raises AdapterRefused (adapter_corrupt) when it is absent, or leads outside."""
        with self._opened(name) as descriptor:
            status = os.fstat(descriptor)
            if self.refuse_hard_links and status.st_nlink > 1:
                why = "has a second name (a hard link), which may lie outside the folders adapters are loaded from"
                raise _bad_file(name, why, "Copy the file itself")
            yield OpenFile(name, descriptor, status.st_size)

    @contextmanager
    def _opened(self, name: str) -> Iterator[int]:
        manager = self.folder.opened_file(name, within=self.within)
        try:
            descriptor = manager.__enter__()
        except LeadsOutside:
            why = "is a symbolic link that leads out of the adapter's folder"
            raise _bad_file(name, why, "Copy the file itself") from None
        except NotAFile:
            raise _bad_file(name, "is not a regular file", "Put the file itself there") from None
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a name"
            raise _bad_file(name, f"cannot be opened: {reason}", "Check that it is there and readable") from None
        try:
            yield descriptor
        finally:
            manager.__exit__(None, None, None)

    def close(self) -> None:
        self.folder.close()

    def __enter__(self) -> "AdapterFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _weights_among(names: set[str], folders: list[str], folder: OpenFolder) -> str:
    """The weights' file or their index. Raises AdapterNotFound, AdapterRefused."""
    _refuse_other_formats(names, folders)
    if CONFIG_NAME not in names:
        raise AdapterNotFound(f"no {CONFIG_NAME} in {shown(str(folder.path))}{_hint(folder, folders)}")
    indexes = [name for name in INDEX_NAMES if name in names]
    # A full model may lie beside an adapter, so model.*.index.json counts only where no adapter's own file does.
    candidates = [name for name in (WEIGHTS_NAME, INDEX_NAMES[0]) if name in names]
    candidates = candidates or sorted(names & {MLX_WEIGHTS_NAME}) or indexes
    if not candidates:
        missing = f"no {WEIGHTS_NAME} or {INDEX_NAMES[0]} in {shown(str(folder.path))}"
        raise AdapterNotFound(f"{missing}{_hint(folder, folders)}")
    if len(candidates) > 1:
        raise AdapterRefused(
            RefusalCode.AMBIGUOUS_LAYOUT,
            f"the folder holds {' and '.join(candidates)}, and only one of them can be meant",
            "Remove the one that is out of date",
            feature=candidates[1],
        )
    return candidates[0]


def _list(folder: OpenFolder) -> tuple[set[str], list[str]]:
    """Names of files (links among them) and of subfolders."""
    names: set[str] = set()
    folders: list[str] = []
    try:
        with folder.entries() as entries:
            for entry, _ in zip(entries, range(_MAX_NAMES), strict=False):
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.name)
                else:
                    names.add(entry.name)
    except OSError as error:
        raise AdapterNotFound(f"no adapter folder at {shown(str(folder.path))}: {error.strerror}") from None
    return names, sorted(folders)


def _refuse_other_formats(names: set[str], folders: list[str]) -> None:
    has_safetensors = any(name.endswith((".safetensors", *INDEX_NAMES)) for name in names)
    pickles = sorted(n for n in names if n.endswith(_PICKLES) and not n.startswith(_TRAINER_PICKLES))
    if pickles and not has_safetensors and (CONFIG_NAME in names or not folders):
        raise AdapterRefused(
            RefusalCode.PICKLE_REFUSED,
            f"the folder holds {shown(pickles[0])} and no safetensors; reading a pickle runs code that it carries",
            "Convert it, which reads it in a process of its own: `loramux convert FOLDER OUT`",
            feature=shown(pickles[0]),
        )
    formats = {
        "gguf": (any(n.endswith(".gguf") for n in names), "GGUF LoRA has lost rsLoRA and alpha_pattern"),
        "diffusers": ("pytorch_lora_weights.safetensors" in names, "this is a LoRA for an image model"),
    }
    for name, (is_found, why) in formats.items():
        if is_found and WEIGHTS_NAME not in names:
            fix = "Serve the PEFT folder it was made from"
            raise AdapterRefused(RefusalCode.UNSUPPORTED, why, fix, feature=f"format={name}")


def _hint(folder: OpenFolder, folders: Sequence[str]) -> str:
    candidates = [name for name in folders[:64] if _holds_config(folder, name)][:5]
    return f"; it is in the subfolder {', '.join(shown(name) for name in candidates)}" if candidates else ""


def _holds_config(folder: OpenFolder, name: str) -> bool:
    try:
        with folder.descend(name) as inner:
            status = inner.status(CONFIG_NAME)
    except OSError:
        return False
    return status is not None and stat.S_ISREG(status.st_mode)


def _boundary_of(real: Path) -> Path:
    """What links may not lead above: the cache when the folder is part of Hugging Face's, or itself."""
    levels = _levels_to_hub_repo(real.parts[1:])
    return real if levels is None else real.parents[min(levels, len(real.parents) - 1)]


def _levels_to_hub_repo(parts: Sequence[str]) -> int | None:
    """How many levels above the folder <repo> is, when it is <repo>/snapshots/<revision> or below that."""
    return next((level + 1 for level in range(1, len(parts)) if parts[-1 - level] == "snapshots"), None)


def _hub_folders_of(folder: OpenFolder) -> list[Parts]:
    """The repo in the hub cache that the folder is part of, and the blobs its repos share; empty if it is in none."""
    levels = _levels_to_hub_repo(folder.parts)
    if levels is None:
        return []
    blobs = folder.status("blobs", levels_up=levels)
    if blobs is None or not stat.S_ISDIR(blobs.st_mode):
        return []
    repo = folder.parts[:-levels]
    if not repo or folder.status(_SHARED_BLOBS, levels_up=levels + 1) is None:
        return [repo]
    return [repo, (*repo[:-1], "blobs")]


def _bad_file(name: str, why: str, fix: str) -> AdapterRefused:
    return AdapterRefused(RefusalCode.CORRUPT, f"{shown(name)} {why}", fix, feature=shown(name))
