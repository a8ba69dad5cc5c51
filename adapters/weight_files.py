"""The safetensors files of one adapter held open, one file or shards: their headers as bytes, not yet parsed.

When `open_weights` returns, the bytes are within the limit and every header fits its file. Knows nothing of what the
headers say (header_table.py) or of what the tensors mean.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from adapters.adapter_folder import AdapterFolder, OpenFile
from adapters.errors import AdapterRefused, RefusalCode
from adapters.safetensors_header import LENGTH_BYTES, MAX_TENSORS, header_length
from adapters.untrusted_json import parse_object, shown

MAX_INDEX_BYTES = MAX_TENSORS * 384
"""A line of an index holds a tensor's name and a file's."""
MAX_SHARDS = 64


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """`headers`: the JSON of each file; `index`: tensor → file name, of a sharded adapter."""

    files: tuple[OpenFile, ...]
    headers: tuple[bytes, ...]
    index: Mapping[str, str] | None = None

    def digest(self) -> bytes:
        """Of all that says which tensors there are and where: headers, sizes and the index."""
        digest = hashlib.sha256()
        for file, header in zip(self.files, self.headers, strict=True):
            digest.update(f"{file.name} {file.num_bytes} {len(header)}\n".encode())
            digest.update(header)
        for name, shard in sorted((self.index or {}).items()):
            digest.update(f"{name} in {shard}\n".encode("utf-8", "surrogatepass"))
        return digest.digest()


@contextmanager
def open_weights(folder: AdapterFolder, *, max_bytes: int) -> Iterator[WeightFiles]:
    """All files, in the order of their names, held open meanwhile. Raises AdapterRefused (adapter_corrupt,
    adapter_too_large)."""
    with ExitStack() as stack:
        index = _read_index(folder) if folder.is_sharded else None
        names = sorted(set(index.values())) if index is not None else [folder.weights]
        files = tuple(stack.enter_context(folder.open(name)) for name in names)
        _check_size(sum(file.num_bytes for file in files), max_bytes)
        yield WeightFiles(files, tuple(map(_read_header, files)), index)


def shard_names(folder: AdapterFolder) -> list[str]:
    """The files of a sharded adapter, from its index alone. Raises AdapterRefused (adapter_corrupt, too_large)."""
    return sorted(set(_read_index(folder).values()))


def _read_header(file: OpenFile) -> bytes:
    length = header_length(file.read(LENGTH_BYTES), file_bytes=file.num_bytes, what=file.name)
    return file.read(length, LENGTH_BYTES)


def _read_index(folder: AdapterFolder) -> dict[str, str]:
    """tensor → file name, from the index of a sharded adapter."""
    with folder.open(folder.weights) as file:
        if file.num_bytes > MAX_INDEX_BYTES:
            raise _too_large(f"{file.name} has {file.num_bytes} bytes, over the limit of {MAX_INDEX_BYTES}")
        table = parse_object(file.read(file.num_bytes), what=file.name).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise _corrupt(f"{folder.weights} has no weight_map")
    index: dict[str, str] = {}
    for name, shard in table.items():
        if not isinstance(shard, str) or "/" in shard or "\0" in shard or not shard.endswith(".safetensors"):
            raise _corrupt(f"{folder.weights} places it in {shown(shard)}, not a safetensors file beside it", name)
        index[name] = shard
    if len(set(index.values())) > MAX_SHARDS:
        raise _too_large(f"{folder.weights} names {len(set(index.values()))} shards, over the limit of {MAX_SHARDS}")
    return index


def _check_size(num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        why = f"the adapter's weights take {num_bytes} bytes, over max_adapter_bytes={max_bytes}"
        fix = f"Restart with --max-adapter-bytes {num_bytes} or more"
        raise AdapterRefused(RefusalCode.TOO_LARGE, why, fix, feature="max_adapter_bytes")


def _too_large(why: str) -> AdapterRefused:
    return AdapterRefused(RefusalCode.TOO_LARGE, why, "Save the LoRA tensors alone, in fewer files")


def _corrupt(why: str, tensor: str | None = None) -> AdapterRefused:
    fix = "The files do not belong together: copy or save them again"
    return AdapterRefused(RefusalCode.CORRUPT, why, fix, tensor=None if tensor is None else shown(tensor))
