"""The LoRA operation in its implementations, and the choice between them by device. One implementation per file."""

import importlib
from importlib.util import find_spec
from typing import cast

import torch

from adapters.ops import reference
from adapters.ops.interface import BoundLoRA, LoRAOps, LoRAPools, RowTarget, RowWriter

__all__ = ["BoundLoRA", "LoRAOps", "LoRAPools", "RowTarget", "RowWriter", "select"]

# numba is looked for, not demanded: the package imports where only torch is installed.
_CPU = "adapters.ops.cpu" if find_spec("numba") else "adapters.ops.reference"
_GPU = "adapters.ops.gpu" if find_spec("triton") else "adapters.ops.reference"


def select(device: torch.device) -> LoRAOps:
    """The fastest implementation for tensors on `device`; the reference where there is none of its own."""
    if device.type == "cpu":
        return cast(LoRAOps, importlib.import_module(_CPU))
    if device.type == "cuda":
        return cast(LoRAOps, importlib.import_module(_GPU))
    return cast(LoRAOps, reference)
