"""How the affine operation's part of a step lies on the device: the tokens that need it, and whom they use.

int32 fields of the step's one buffer, written whole each step, as those of LoRA are (gpu_batch.py): what lies past the
step reads as tokens without entries. Needs no Triton.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from adapters.extras_batch import IntArray32
from adapters.lora_batch import LoRABatch

_ALIGNMENT = 4  # words: every field begins on 16 bytes when the buffer does


@dataclass(frozen=True, slots=True, eq=False)
class AffineStep:
    """A step's adapters, and those of its tokens [num_affine] with an entry whose adapter has vectors."""

    lora: LoRABatch
    tokens: IntArray32


@dataclass(frozen=True, slots=True, kw_only=True)
class AffineCaps:
    """What one buffer can hold."""

    num_tokens: int  # of y, exactly: the forward pass is padded to it
    num_affine: int  # tokens with vectors
    num_entries: int  # of these together


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GPUAffineBatch:
    """The fields on the device."""

    caps: AffineCaps
    tokens: Tensor  # int32 [num_affine]
    indptr: Tensor  # int32 [num_affine + 1]
    entry_starts: Tensor  # int32 [num_entries] first pool row
    entry_weights: Tensor  # float32 [num_entries]


class AffineStaging:
    """The affine operation's StagedPart."""

    def bucket(self, num_rows: int) -> AffineCaps:
        """Of num_rows tokens with as many entries, all of which may have vectors."""
        return AffineCaps(num_tokens=num_rows, num_affine=num_rows, num_entries=num_rows)

    def exact(self, step: AffineStep) -> AffineCaps:
        num_entries = int(_counts(step).sum())
        return AffineCaps(num_tokens=step.lora.num_tokens, num_affine=len(step.tokens), num_entries=num_entries)

    def layout(self, caps: AffineCaps) -> dict[str, int]:
        """Field → number of int32 words."""
        words = {
            "tokens": caps.num_affine,
            "indptr": caps.num_affine + 1,
            "entry_starts": caps.num_entries,
            "entry_weights": caps.num_entries,
        }
        return {name: -(-count // _ALIGNMENT) * _ALIGNMENT for name, count in words.items()}

    def fill(self, views: Mapping[str, IntArray32], step: AffineStep, caps: AffineCaps) -> None:
        """Write all of every field; ValueError when the step is over `caps`."""
        found = self.exact(step)
        is_held = found.num_affine <= caps.num_affine and found.num_entries <= caps.num_entries
        if not is_held or found.num_tokens > caps.num_tokens:
            raise ValueError(f"an affine step of {found} is over {caps}: take a larger bucket")
        counts = _counts(step)
        indptr = np.zeros(len(counts) + 1, np.int32)
        np.cumsum(counts, out=indptr[1:])
        entries = np.arange(indptr[-1]) + np.repeat(step.lora.indptr[step.tokens] - indptr[:-1], counts)
        for name, values, padding in (
            ("tokens", step.tokens, 0),
            ("indptr", indptr, indptr[-1]),
            ("entry_starts", step.lora.starts[entries], 0),
            ("entry_weights", step.lora.weights[entries].view(np.int32), 0),
        ):
            views[name][: len(values)] = values
            views[name][len(values) :] = padding

    def from_device(self, views: Mapping[str, Tensor], caps: AffineCaps) -> GPUAffineBatch:
        weights = views["entry_weights"].view(torch.float32)
        return GPUAffineBatch(caps=caps, **{**views, "entry_weights": weights})

    def stage(self, step: AffineStep, device: torch.device, caps: AffineCaps | None = None) -> GPUAffineBatch:
        """A step in a buffer and a copy of its own, of its own size unless `caps` say another."""
        caps = caps or self.exact(step)
        words = self.layout(caps)
        buffer = torch.empty(sum(words.values()), dtype=torch.int32, pin_memory=device.type == "cuda")
        parts = buffer.split(list(words.values()))
        self.fill({name: part.numpy() for name, part in zip(words, parts, strict=True)}, step, caps)
        parts = buffer.to(device, non_blocking=True).split(list(words.values()))
        return self.from_device(dict(zip(words, parts, strict=True)), caps)


def _counts(step: AffineStep) -> npt.NDArray[np.int32]:
    """Entries of each affine token."""
    return step.lora.indptr[step.tokens + 1] - step.lora.indptr[step.tokens]
