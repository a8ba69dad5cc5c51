"""The header of a safetensors file, checked against the file's size before one byte of data is read.

The format: u64 length (little endian), that many bytes of JSON {name: {dtype, shape, data_offsets}}, then the data.
Stricter than the reference reader, which takes duplicate names, control characters, a hundred thousand dimensions and
a 64 MB header. Knows nothing of LoRA; every failure is an AdapterRefused.
"""

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from adapters.errors import AdapterRefused, RefusalCode
from adapters.untrusted_json import parse_object, shown

MAX_TENSORS = 16384
"""A and B of 7 linears in 80 layers are 1120; the rest is room for per-module oddities."""
MAX_HEADER_BYTES = MAX_TENSORS * 256
"""4 MiB. An entry of a real file takes 150 to 230 bytes, so the tensor limit is met before this one."""
LENGTH_BYTES = 8

_MAX_DIMENSIONS = 8
_NAME = re.compile(r"[A-Za-z0-9_.:/@+\-]{1,512}")
_ITEM_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What tensors that are computed with may be stored as."""
LORA_DTYPES = frozenset(TORCH_DTYPES)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor as its file declares it: bytes [begin, end) of the data that follows the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin


def header_length(prefix: bytes, *, file_bytes: int, what: str) -> int:
    """Bytes of JSON that follow the first eight, from those eight and the size fstat gave."""
    if len(prefix) < LENGTH_BYTES:
        raise _corrupt(what, f"is {file_bytes} bytes long, shorter than a safetensors header")
    (length,) = struct.unpack("<Q", prefix)
    if length > file_bytes - LENGTH_BYTES:
        raise _corrupt(what, f"declares a header of {length} bytes in a file of {file_bytes}")
    if length > MAX_HEADER_BYTES:
        raise AdapterRefused(
            RefusalCode.TOO_LARGE,
            f"{what} has a header of {length} bytes, over the limit of {MAX_HEADER_BYTES}",
            f"An adapter of at most {MAX_TENSORS} tensors fits the limit; save it again",
            feature=what,
        )
    return int(length)


def parse_header(header: bytes, *, data_bytes: int, what: str) -> dict[str, TensorEntry]:
    """The tensors of one file by name, in the order of their data, which they cover exactly.

    `header` is the JSON alone, `data_bytes` what the file holds after it. Raises AdapterRefused (adapter_corrupt,
    adapter_too_large) when names, dtypes, shapes and offsets do not fit each other or the file.
    """
    declared = parse_object(header, what=f"the header of {what}")
    _check_metadata(declared.pop("__metadata__", None), what)
    if not declared:
        raise _corrupt(what, "holds no tensors")
    if len(declared) > MAX_TENSORS:
        why = f"{what} holds {len(declared)} tensors, over the limit of {MAX_TENSORS}"
        raise AdapterRefused(RefusalCode.TOO_LARGE, why, "Save the LoRA tensors alone", feature=what)
    entries = sorted((_parse_entry(name, fields) for name, fields in declared.items()), key=lambda e: (e.begin, e.end))
    _check_cover(entries, data_bytes, what)
    return {entry.name: entry for entry in entries}


def require_matrix(entry: TensorEntry) -> None:
    """LoRA's A and B are non-empty matrices of floats of 16 or 32 bits; raises AdapterRefused for anything else."""
    require_numbers(entry)
    if len(entry.shape) != 2:
        raise AdapterRefused(
            RefusalCode.UNSUPPORTED,
            f"the tensor has {len(entry.shape)} dimensions; LoRA on linears has 2 (convolutions and experts have more)",
            "Train LoRA on linear modules only",
            tensor=entry.name,
        )
    require_floats(entry)


def require_numbers(entry: TensorEntry) -> None:
    if 0 in entry.shape:
        raise AdapterRefused(
            RefusalCode.CORRUPT,
            f"the tensor has the shape {list(entry.shape)} and holds no numbers",
            "This is what a ZeRO-3 run saves without gathering: gather the parameters and save again",
            tensor=entry.name,
        )


def require_floats(entry: TensorEntry) -> None:
    """Stored in a dtype that what is computed with may have."""
    if entry.dtype not in LORA_DTYPES:
        raise AdapterRefused(
            RefusalCode.UNSUPPORTED,
            f"the tensor is stored as {entry.dtype}; served are {', '.join(sorted(LORA_DTYPES))}",
            "Save the adapter in float32, bfloat16 or float16",
            tensor=entry.name,
        )


def _check_metadata(metadata: object, what: str) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, Mapping) or not all(isinstance(value, str) for value in metadata.values()):
        raise _corrupt(what, "has __metadata__ that is not a table of strings")


def _parse_entry(name: str, fields: object) -> TensorEntry:
    if not _NAME.fullmatch(name):
        raise AdapterRefused(
            RefusalCode.CORRUPT,
            "the tensor's name is empty, over 512 characters, or holds others than letters, digits and _ . : / @ + -",
            "Save the adapter again with PEFT",
            tensor=shown(name),
        )
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise _bad_tensor(name, "the header gives something else than dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], _naturals(fields["shape"]), _naturals(fields["data_offsets"])
    if not isinstance(dtype, str) or dtype not in _ITEM_BITS:
        raise _bad_tensor(name, f"the dtype {shown(dtype)} is not one of safetensors'")
    if shape is None or len(shape) > _MAX_DIMENSIONS:
        raise _bad_tensor(name, f"the shape {shown(fields['shape'])} is not a list of at most {_MAX_DIMENSIONS} sizes")
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _bad_tensor(name, f"the data_offsets {shown(fields['data_offsets'])} are not [begin, end]")
    entry = TensorEntry(name, dtype, shape, *offsets)
    if math.prod(shape) * _ITEM_BITS[dtype] != entry.num_bytes * 8:
        raise _bad_tensor(name, f"{dtype} {shown(list(shape))} does not take the {entry.num_bytes} bytes declared")
    return entry


def _naturals(value: object) -> tuple[int, ...] | None:
    """The list as a tuple when it is one of integers from 0 to 2^63; bool is an int to Python, not to the format."""
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item < 1 << 63 for item in value):
        return None
    return tuple(value)


def _check_cover(entries: list[TensorEntry], data_bytes: int, what: str) -> None:
    """Tensor after tensor without overlap, hole or rest, so that no byte has two owners or none."""
    position = 0
    for entry in entries:
        if entry.begin != position:
            kind = "overlaps the one before it" if entry.begin < position else "leaves a hole before it"
            raise _bad_tensor(entry.name, f"its data at {entry.begin} {kind}, which ends at {position}")
        position = entry.end
    if position != data_bytes:
        raise _corrupt(what, f"declares {position} bytes of data and holds {data_bytes}: truncated, or with a tail")


def _bad_tensor(name: str, why: str) -> AdapterRefused:
    return AdapterRefused(RefusalCode.CORRUPT, why, "The file is damaged: copy or save it again", tensor=name)


def _corrupt(what: str, why: str) -> AdapterRefused:
    fix = "The file is damaged: copy or save it again"
    return AdapterRefused(RefusalCode.CORRUPT, f"{what} {why}", fix, feature=what)
