"""One step's arrays in one buffer: filled on the host in pinned memory, sent to the device in one copy.

Every field is a run of int32 words in one layout, which depends on the step's caps alone, so the buffer of a batch
bucket has the same addresses in every step and a captured graph may read it. LoRA's fields come after the others, those
of affine vectors last: a step that does not need them sends only what stands before. Knows the fields of tokens; those
of attention, LoRA and affine vectors are laid out, filled and read by the parts it is given. On the CPU everything
works alike, without pinning.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from adapters.ops.gpu_affine_batch import AffineStep
from adapters.step_features import StepFeature
from server.engine.forward_batch import ForwardBatch

Words = npt.NDArray[np.int32]

_ALIGNMENT = 32  # words, 128 bytes: what wide loads want


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCaps:
    """What a layout has room for. A bucket's caps never change, so nothing captured may depend on less."""

    num_tokens: int
    num_logits: int
    attention: Hashable  # the part's own
    lora: Hashable  # the part's own; None = base rows only
    affine: Hashable = None  # the part's own; None = nobody has affine vectors


class StagedPart(Protocol):
    """How the metadata of one operation lies in the buffer. Its caps are its own affair."""

    def bucket(self, num_rows: int) -> Hashable:
        """The caps for any step of up to `num_rows` rows of one new token each, and as many adapters in all."""

    def exact(self, batch: Any) -> Hashable:
        """The caps for this batch alone."""

    def layout(self, caps: Any) -> Mapping[str, int]:
        """Field → how many int32 words it takes."""

    def fill(self, views: Mapping[str, Words], batch: Any, caps: Any) -> None:
        """Write all of every view; what lies past the batch must read as nothing to do."""

    def from_device(self, views: Mapping[str, Tensor], caps: Any) -> Any:
        """The metadata as the operation reads it; made once for a bucket, so it may hold views but no values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedStep:
    """One step on the device. `lora` is None in a step of base rows, `affine` where no adapter has such vectors."""

    input_ids: Tensor  # int64 [caps.num_tokens], 0 past the batch
    positions: Tensor  # int64 [caps.num_tokens], 0 past the batch
    carried: Tensor  # int64 [caps.num_tokens] row of the step before that samples the id, -1 = input_ids is right
    logits_indices: Tensor  # int64 [caps.num_logits], 0 past the batch
    attention: Any
    lora: Any
    affine: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedParts:
    """What lays out, fills and reads the metadata of each operation."""

    attention: StagedPart
    lora: StagedPart  # batches are LoRABatch
    affine: StagedPart  # batches are AffineStep


@dataclass(frozen=True, slots=True)
class _Span:
    begin: int
    end: int


class StepLayout:
    """Where the fields of every part lie, part by part in their order. `sizes`: part → field → words."""

    def __init__(self, sizes: Mapping[str, Mapping[str, int]]) -> None:
        self._spans: dict[str, dict[str, _Span]] = {}
        self._ends: dict[str, int] = {}
        end = 0
        for name, fields in sizes.items():
            spans = self._spans[name] = {}
            for field, num_words in fields.items():
                spans[field] = _Span(end, end + num_words)
                end += -(-num_words // _ALIGNMENT) * _ALIGNMENT
            self._ends[name] = end
        self.num_words = end

    def end_of(self, part: str) -> int:
        """Words up to the end of those of `part`."""
        return self._ends[part]

    def host_views(self, part: str, words: Words) -> dict[str, Words]:
        return {field: words[span.begin : span.end] for field, span in self._spans[part].items()}

    def device_views(self, part: str, words: Tensor) -> dict[str, Tensor]:
        return {field: words[span.begin : span.end] for field, span in self._spans[part].items()}


class HostBuffer:
    """Words on the host that are sent to the device without waiting; `reserve` waits for the copy before."""

    def __init__(self, device: torch.device) -> None:
        self._is_pinned = device.type == "cuda"
        self._copied = torch.cuda.Event() if self._is_pinned else None
        self._words = torch.empty(0, dtype=torch.int32)

    def reserve(self, num_words: int) -> Words:
        """The buffer, [num_words or more], free to be written."""
        if self._copied is not None:
            self._copied.synchronize()
        if len(self._words) < num_words:
            self._words = torch.empty(num_words, dtype=torch.int32, pin_memory=self._is_pinned)
        words: Words = self._words.numpy()
        return words

    def send(self, target: Tensor) -> None:
        """target[:] = the first words of the buffer, in the order of the device's stream."""
        target.copy_(self._words[: len(target)], non_blocking=True)
        if self._copied is not None:
            self._copied.record()


@dataclass(frozen=True, slots=True)
class _Staging:
    """What is fixed for some caps: the layout, the words on the device, and the staged objects that read them, by the
    last part that a step sends."""

    layout: StepLayout
    words: Tensor
    steps: Mapping[str, StagedStep]  # "attention", "lora", "affine", as far as the caps go


class DeviceStep:
    """Stages steps. `buckets` get addresses that never change; all share one buffer, since one step runs at a time."""

    def __init__(self, device: torch.device, parts: StagedParts, *, buckets: Sequence[StepCaps] = ()) -> None:
        self._device = device
        self._parts = parts
        # Two: while one is on its way to the device, the next step is written into the other.
        self._hosts = [HostBuffer(device), HostBuffer(device)]
        capacity = max((self._layout(caps).num_words for caps in buckets), default=0)
        words = torch.zeros(capacity, dtype=torch.int32, device=device)
        self._buckets = {caps: self._staging(caps, words) for caps in buckets}

    def stage(self, batch: ForwardBatch, caps: StepCaps) -> StagedStep:
        """Send `batch` to the device: to its fixed addresses when `caps` are a bucket's, else to words of its own."""
        staging = self._buckets.get(caps) or self._staging(caps, None)
        layout = staging.layout
        affine = affine_step(batch)
        host = self._hosts[0]
        self._hosts.reverse()
        words = host.reserve(layout.num_words)
        _fill_tokens(layout.host_views("tokens", words), batch)
        self._parts.attention.fill(layout.host_views("attention", words), batch.attention, caps.attention)
        if batch.lora is not None:
            self._parts.lora.fill(layout.host_views("lora", words), batch.lora, caps.lora)
        if affine is not None:
            self._parts.affine.fill(layout.host_views("affine", words), affine, caps.affine)
        last = _last_part(has_lora=batch.lora is not None, has_affine=affine is not None)
        host.send(staging.words[: layout.end_of(last)])
        return staging.steps[last]

    def staged(self, caps: StepCaps, *, has_lora: bool, has_affine: bool = False) -> StagedStep:
        """What `stage` returns for a bucket, whatever stands there now."""
        return self._buckets[caps].steps[_last_part(has_lora=has_lora, has_affine=has_affine)]

    def _layout(self, caps: StepCaps) -> StepLayout:
        per_token = dict.fromkeys(("input_ids", "positions", "carried"), 2 * caps.num_tokens)
        sizes: dict[str, Mapping[str, int]] = {
            "tokens": {**per_token, "logits_indices": 2 * caps.num_logits},
            "attention": self._parts.attention.layout(caps.attention),
        }
        if caps.lora is not None:
            sizes["lora"] = self._parts.lora.layout(caps.lora)
        if caps.affine is not None:
            sizes["affine"] = self._parts.affine.layout(caps.affine)
        return StepLayout(sizes)

    def _staging(self, caps: StepCaps, words: Tensor | None) -> _Staging:
        """Over `words`, or words of its own."""
        layout = self._layout(caps)
        if words is None:
            words = torch.empty(layout.num_words, dtype=torch.int32, device=self._device)
        tokens = {name: view.view(torch.int64) for name, view in layout.device_views("tokens", words).items()}
        attention = self._parts.attention.from_device(layout.device_views("attention", words), caps.attention)
        steps = {"attention": StagedStep(**tokens, attention=attention, lora=None)}
        if caps.lora is not None:
            lora = self._parts.lora.from_device(layout.device_views("lora", words), caps.lora)
            steps["lora"] = replace(steps["attention"], lora=lora)
        if caps.affine is not None:
            affine = self._parts.affine.from_device(layout.device_views("affine", words), caps.affine)
            steps["affine"] = replace(steps["lora"], affine=affine)
        return _Staging(layout, words, steps)


def affine_step(batch: ForwardBatch) -> AffineStep | None:
    """The batch's part of the affine operation; None when no adapter of it has such vectors."""
    if batch.extras is None or not batch.extras.features & StepFeature.AFFINE:
        return None
    assert batch.lora is not None
    return AffineStep(batch.lora, batch.extras.affine_tokens)


def _last_part(*, has_lora: bool, has_affine: bool) -> str:
    """Of those that a step sends."""
    if has_affine:
        return "affine"
    return "lora" if has_lora else "attention"


def _fill_tokens(views: Mapping[str, Words], batch: ForwardBatch) -> None:
    """All of every view; int64, so that the model takes them without a copy."""
    for name, values, padding in (
        ("input_ids", batch.input_ids, 0),
        ("positions", batch.positions, 0),
        ("logits_indices", batch.logits_indices, 0),
        ("carried", batch.carried, -1),
    ):
        view = views[name].view(np.int64)
        used = 0 if values is None else len(values)
        view[used:] = padding
        if values is not None:
            view[:used] = values
