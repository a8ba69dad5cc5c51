"""All tensors of one safetensors file in memory, read with the parser that reads every adapter.

Knows nothing of what they mean. Every failure is an AdapterRefused.
"""

import os
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from adapters.adapter_folder import OpenFile
from adapters.errors import AdapterRefused, RefusalCode
from adapters.safetensors_header import LENGTH_BYTES, LORA_DTYPES, TORCH_DTYPES, header_length, parse_header


def read_file(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        return read_tensors(file, path.name)


def read_tensors(opened: BinaryIO, name: str) -> dict[str, Tensor]:
    """Of an open safetensors file, each tensor in memory of its own."""
    file = OpenFile(name, opened.fileno(), os.fstat(opened.fileno()).st_size)
    length = header_length(file.read(LENGTH_BYTES), file_bytes=file.num_bytes, what=name)
    start = LENGTH_BYTES + length
    entries = parse_header(file.read(length, LENGTH_BYTES), data_bytes=file.num_bytes - start, what=name)
    tensors: dict[str, Tensor] = {}
    for entry in entries.values():
        if entry.dtype not in LORA_DTYPES or entry.num_bytes == 0:
            why = (
                f"the tensor is {entry.dtype} {list(entry.shape)}; read are non-empty {', '.join(sorted(LORA_DTYPES))}"
            )
            raise AdapterRefused(RefusalCode.UNSUPPORTED, why, "Save it in 16 or 32 bits", tensor=entry.name)
        data = bytearray(entry.num_bytes)
        file.read_into(memoryview(data), start + entry.begin)
        tensors[entry.name] = torch.frombuffer(data, dtype=TORCH_DTYPES[entry.dtype]).view(entry.shape)
    return tensors
