"""Writes a safetensors file, tensor after tensor, so that no second copy of all of them is made.

Format: u64 length (little endian), that many bytes of JSON {name: {dtype, shape, data_offsets}}, then the data. Imports
nothing but torch, since the process that reads pickles writes with it. Checks nothing: the reader does.
"""

import json
import struct
from collections.abc import Mapping
from typing import BinaryIO

import torch
from torch import Tensor

DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_ALIGNMENT = 8  # of the data's beginning, as the reference writer has it


def write_safetensors(file: BinaryIO, tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors`, which are dense, on the CPU and of a dtype in DTYPE_NAMES, in the order of their names."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in sorted(tensors.items()):
        num_bytes = tensor.numel() * tensor.itemsize
        offsets = [position, position + num_bytes]
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        position += num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    file.write(struct.pack("<Q", len(text)) + text)
    for _, tensor in sorted(tensors.items()):
        file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    file.flush()
