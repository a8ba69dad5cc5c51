"""Tensors wherever they stand in dataclasses and mappings, on another device. Knows none of them by name."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")


def moved(value: _T, device: torch.device) -> _T:
    """A copy whose tensors are on `device`; what is there already is shared."""
    found: Any = value
    if isinstance(found, Tensor):
        found = found.to(device)
    elif isinstance(found, Mapping):
        found = MappingProxyType({key: moved(each, device) for key, each in found.items()})
    elif is_dataclass(found) and not isinstance(found, type):
        found = replace(found, **{each.name: moved(getattr(found, each.name), device) for each in fields(found)})
    result: _T = found
    return result
