"""The safetensors files of one adapter as one table of tensors, one file or shards, checked and not yet read.

When `open_weights` returns, every header fits its file, the index (if any) names exactly the tensors that exist, and
the bytes are within the limit. Reading then copies into private memory, so that a later change of a file cannot reach
what was checked. Knows nothing of what the tensors mean.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.adapter_folder import AdapterFolder, OpenFile
from adapters.errors import AdapterRefused, RefusalCode
from adapters.safetensors_header import LENGTH_BYTES, MAX_TENSORS, TensorEntry, header_length, parse_header
from adapters.untrusted_json import parse_object, shown

MAX_INDEX_BYTES = MAX_TENSORS * 384
"""A line of an index holds a tensor's name and a file's."""
MAX_SHARDS = 64

TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor in its file; `data_start` is where the file's data begins."""

    entry: TensorEntry
    file: OpenFile
    data_start: int

    def read(self, memory: memoryview) -> memoryview:
        """The tensor's bytes, in the beginning of `memory`, which is as long at least."""
        data = memory[: self.entry.num_bytes]
        self.file.read_into(data, self.data_start + self.entry.begin)
        return data

    def as_tensor(self, data: memoryview) -> Tensor:
        """The bytes `read` gave as a tensor of the declared shape; shares their memory."""
        return torch.frombuffer(data, dtype=TORCH_DTYPES[self.entry.dtype]).view(self.entry.shape)


@contextmanager
def open_weights(folder: AdapterFolder, *, max_bytes: int) -> Iterator[Mapping[str, StoredTensor]]:
    """All tensors by name, files held open meanwhile. Raises AdapterRefused (adapter_corrupt, adapter_too_large)."""
    with ExitStack() as stack:
        index = _read_index(folder) if folder.is_sharded else None
        names = sorted(set(index.values())) if index is not None else [folder.weights]
        files = [stack.enter_context(folder.open(name)) for name in names]
        _check_size(sum(file.num_bytes for file in files), max_bytes)
        tensors: dict[str, StoredTensor] = {}
        for file in files:
            for name, stored in _read_header(file).items():
                if name in tensors:
                    raise _corrupt(f"the tensor stands in {tensors[name].file.name} and in {file.name}", name)
                tensors[name] = stored
        if len(tensors) > MAX_TENSORS:
            raise _too_large(f"the shards hold {len(tensors)} tensors, over the limit of {MAX_TENSORS}")
        if index is not None:
            _check_index(index, tensors)
        yield tensors


def shard_names(folder: AdapterFolder) -> list[str]:
    """The files of a sharded adapter, from its index alone. Raises AdapterRefused (adapter_corrupt, too_large)."""
    return sorted(set(_read_index(folder).values()))


def _read_header(file: OpenFile) -> dict[str, StoredTensor]:
    length = header_length(file.read(LENGTH_BYTES), file_bytes=file.num_bytes, what=file.name)
    start = LENGTH_BYTES + length
    entries = parse_header(file.read(length, LENGTH_BYTES), data_bytes=file.num_bytes - start, what=file.name)
    return {name: StoredTensor(entry, file, start) for name, entry in entries.items()}


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


def _check_index(index: Mapping[str, str], tensors: Mapping[str, StoredTensor]) -> None:
    for name in index.keys() | tensors.keys():
        place = tensors[name].file.name if name in tensors else None
        if index.get(name) != place:
            raise _corrupt(f"the index places it in {shown(index.get(name))}, it is in {place or 'no shard'}", name)


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
