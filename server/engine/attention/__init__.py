"""Paged attention: the seam to transformers (interface) and its implementations (reference, cpu)."""

import torch

from server.engine.attention import reference
from server.engine.attention.cpu import CPUAttention
from server.engine.attention.interface import AttentionBackend


def select_backend(device: torch.device) -> AttentionBackend:
    """The fastest backend that serves `device`; the reference is correct everywhere and slow."""
    return CPUAttention() if device.type == "cpu" else reference.attend
