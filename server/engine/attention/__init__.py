"""Paged attention: the seam to transformers (interface) and its implementations (reference, cpu, gpu)."""

import importlib
from importlib.util import find_spec
from typing import cast

import torch

from server.engine.attention import reference
from server.engine.attention.interface import AttentionBackend


def select_backend(device: torch.device) -> AttentionBackend:
    """The fastest backend that serves `device`; the reference is correct everywhere and slow."""
    if device.type == "cpu" and find_spec("numba"):
        return cast(AttentionBackend, importlib.import_module("server.engine.attention.cpu").CPUAttention())
    if device.type == "cuda" and find_spec("triton"):
        return cast(AttentionBackend, importlib.import_module("server.engine.attention.gpu").GPUAttention())
    return reference.attend
