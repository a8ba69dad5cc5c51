"""Operations in their implementations, one per file, and the choice between them by device."""

import importlib
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import cast

import torch
from torch import Tensor

from adapters.ops import reference, reference_affine, reference_product
from adapters.ops.affine_interface import AffineOps, AffineTable, BoundAffine
from adapters.ops.interface import BoundLoRA, LoRAOps, LoRAPools, RowTarget, RowWriter

__all__ = [
    "AffineOps",
    "AffineTable",
    "BoundAffine",
    "BoundLoRA",
    "LoRAOps",
    "LoRAPools",
    "RowTarget",
    "RowWriter",
    "lent_core",
    "product",
    "select",
    "select_affine",
]

# numba is looked for, not demanded: the package imports where only torch is installed.
_CPU = "adapters.ops.cpu" if find_spec("numba") else "adapters.ops.reference"
_CPU_AFFINE = "adapters.ops.cpu_affine" if find_spec("numba") else "adapters.ops.reference_affine"
_CPU_PRODUCT = "adapters.ops.cpu_product" if find_spec("numba") else "adapters.ops.reference_product"
_GPU = "adapters.ops.gpu" if find_spec("triton") else "adapters.ops.reference"
_GPU_AFFINE = "adapters.ops.gpu_affine" if find_spec("triton") else "adapters.ops.reference_affine"


def select(device: torch.device) -> LoRAOps:
    """The fastest implementation for tensors on `device`; the reference where there is none of its own."""
    if device.type == "cpu":
        return cast(LoRAOps, importlib.import_module(_CPU))
    if device.type == "cuda":
        return cast(LoRAOps, importlib.import_module(_GPU))
    return cast(LoRAOps, reference)


def select_affine(device: torch.device) -> AffineOps:
    """The affine operation for tensors on `device`."""
    if device.type == "cpu":
        return cast(AffineOps, importlib.import_module(_CPU_AFFINE))
    if device.type == "cuda":
        return cast(AffineOps, importlib.import_module(_GPU_AFFINE))
    return cast(AffineOps, reference_affine)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [num_rows, in] · weight [out, in]ᵀ, float32 [num_rows, out]; a row's bits depend on nothing but the row."""
    where = importlib.import_module(_CPU_PRODUCT) if x.device.type == "cpu" else reference_product
    return cast(Tensor, where.product(x, weight))


def lent_core() -> AbstractContextManager[None]:
    """Inside, decoding leaves one of its cores to the calling thread, if it has several."""
    if find_spec("numba") is None:
        return nullcontext()
    team = importlib.import_module("adapters.ops.thread_team").current_team()
    return cast(AbstractContextManager[None], team.lent_core())
