"""What the headers of an adapter's files say, as one table of tensors: checked, and no byte of data read.

When `read_table` returns, every header fits its file, no tensor stands twice, and the index (if any) names exactly the
tensors that exist. Knows nothing of what the tensors mean, and holds no file open.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from adapters.errors import AdapterRefused, RefusalCode
from adapters.safetensors_header import LENGTH_BYTES, MAX_TENSORS, TensorEntry, parse_header
from adapters.untrusted_json import shown
from adapters.weight_files import WeightFiles


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor: its bytes stand from `offset` on in the file of that number."""

    entry: TensorEntry
    file: int
    offset: int


@dataclass(frozen=True, slots=True)
class HeaderTable:
    tensors: Mapping[str, StoredTensor]  # in the order of their names

    @property
    def entries(self) -> dict[str, TensorEntry]:
        return {name: stored.entry for name, stored in self.tensors.items()}

    def declared(self) -> bytes:
        """Every tensor's name, dtype and shape, one spelling for one table: their part of an adapter's version."""
        rows = [[name, stored.entry.dtype, stored.entry.shape] for name, stored in self.tensors.items()]
        return json.dumps(rows, separators=(",", ":")).encode("ascii")


def read_table(weights: WeightFiles) -> HeaderTable:
    """Raises AdapterRefused (adapter_corrupt, adapter_too_large)."""
    tensors: dict[str, StoredTensor] = {}
    names = [file.name for file in weights.files]
    for number, (file, header) in enumerate(zip(weights.files, weights.headers, strict=True)):
        start = LENGTH_BYTES + len(header)
        for name, entry in parse_header(header, data_bytes=file.num_bytes - start, what=file.name).items():
            if name in tensors:
                raise _corrupt(f"the tensor stands in {names[tensors[name].file]} and in {file.name}", name)
            tensors[name] = StoredTensor(entry, number, start + entry.begin)
    if len(tensors) > MAX_TENSORS:
        why = f"the shards hold {len(tensors)} tensors, over the limit of {MAX_TENSORS}"
        raise AdapterRefused(RefusalCode.TOO_LARGE, why, "Save the LoRA tensors alone, in fewer files")
    if weights.index is not None:
        _check_index(weights.index, {name: names[stored.file] for name, stored in tensors.items()})
    return HeaderTable(dict(sorted(tensors.items())))


def _check_index(index: Mapping[str, str], found: Mapping[str, str]) -> None:
    for name in index.keys() | found.keys():
        if index.get(name) != found.get(name):
            place = found.get(name, "no shard")
            raise _corrupt(f"the index places it in {shown(index.get(name))}, it is in {place}", name)


def _corrupt(why: str, tensor: str) -> AdapterRefused:
    fix = "The files do not belong together: copy or save them again"
    return AdapterRefused(RefusalCode.CORRUPT, why, fix, tensor=shown(tensor))
