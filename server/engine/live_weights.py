"""The base's weights as a loaded model holds them, read back in parts: plain, transposed, or packed for the CPU.

Packing only puts numbers elsewhere, so what comes back is what was loaded, to the bit. Knows nothing of adapters.
"""

import hashlib
import json
import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

_WHOLE = 1 << 30  # bytes of a base that is read whole: half a second
_PIECES, _PIECE = 64, 4 << 10  # of each tensor of a larger one


class LiveWeights:
    """Satisfies `adapters.base_weights.BaseWeights`. `model` is asked for when a weight is first needed."""

    def __init__(self, model: Callable[[], nn.Module], fingerprint: str) -> None:
        self._make = model
        self.fingerprint = fingerprint

    @cached_property
    def _model(self) -> nn.Module:
        return self._make()

    def shape(self, parameter: str) -> tuple[int, ...] | None:
        found = self._find(parameter)
        if found is None:
            return None
        module, weight = found
        if parameter.endswith(".weight") and isinstance(module, nn.Linear):
            return module.out_features, module.in_features
        return tuple(weight.T.shape) if _is_transposed(module, weight) else tuple(weight.shape)

    @torch.no_grad()
    def rows(self, parameter: str, begin: int, end: int) -> Tensor:
        """KeyError when the model has no such parameter."""
        found = self._find(parameter)
        if found is None:
            raise KeyError(parameter)
        module, weight = found
        return _rows(module, weight, begin, end).to("cpu", torch.float32, copy=True)

    def _find(self, parameter: str) -> tuple[nn.Module, Tensor] | None:
        owner, _, name = parameter.rpartition(".")
        try:
            module = self._model.get_submodule(owner)
        except AttributeError:
            return None
        weight = module._parameters.get(name)
        return None if weight is None else (module, weight.detach())


def _rows(module: nn.Module, weight: Tensor, begin: int, end: int) -> Tensor:
    if weight.ndim == 4 and isinstance(module, nn.Linear):  # panels [out / 32, in / 2, 32, 2] (panel_linear.py)
        width = weight.shape[2]
        first = begin // width
        panels = weight[first : -(-end // width)].permute(0, 2, 1, 3)
        return panels.reshape(-1, module.in_features)[begin - first * width : end - first * width]
    if weight.is_mkldnn:
        return weight.to_dense()[begin:end]
    if _is_transposed(module, weight):
        return weight[:, begin:end].T
    return weight[begin:end]


def _is_transposed(module: nn.Module, weight: Tensor) -> bool:
    """GPT-2's Conv1D has [in, out]; known by its sizes, so that transformers is not asked."""
    return weight.ndim == 2 and hasattr(module, "nx") and hasattr(module, "nf")


def fingerprint(folder: Path) -> str:
    """SHA-256 over the config and the weight files, of large ones over pieces of every tensor: other weights have
    another, but for a few values of a large base. Raises OSError, ValueError.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    paths = sorted(folder.glob("*.safetensors"))
    is_large = sum(path.stat().st_size for path in paths) > _WHOLE
    for path in paths:
        with path.open("rb") as file:
            digest.update(json.dumps([path.name, os.fstat(file.fileno()).st_size]).encode())
            if is_large:
                _feed_pieces(digest, file)
            else:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _feed_pieces(digest: "hashlib._Hash", file: BinaryIO) -> None:
    header = file.read(int.from_bytes(file.read(8), "little"))
    digest.update(header)
    start = 8 + len(header)
    for name, entry in json.loads(header).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            for piece in range(_PIECES):
                file.seek(start + begin + (end - begin) * piece // _PIECES)
                digest.update(file.read(min(_PIECE, end - begin)))
