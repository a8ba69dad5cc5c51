"""How stock transformers attention reaches our KV cache: one registered function, one binding per attention module.

transformers calls the function (base_model.py registers it) with the packed batch of a step (`[1, heads, num_tokens,
head_dim]`, RoPE already applied) and no mask. Models drop extra keyword arguments, so the step's metadata and the
layer's K and V travel on the module instead: `bind` hangs a `LayerBinding` on every attention module at load,
`StepContext.running` sets the metadata for the length of one forward pass. Knows nothing of requests, adapters or
sampling.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

ATTENTION_NAME = "loramux"
_BINDING = "loramux_layer"


@dataclass(frozen=True, slots=True)
class KVLayer:
    """The paged cache of one layer. Slot s is block s // block_size, offset s % block_size."""

    k_cache: Tensor  # [num_blocks, block_size, num_kv_heads, head_dim]
    v_cache: Tensor  # [num_blocks, block_size, num_kv_heads, v_head_dim]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMetadata:
    """The shape of one step, shared by all layers. Row i's new tokens are [query_starts[i], query_starts[i + 1])
    of the packed batch and the last of its context; rows [0, num_decode_rows) have exactly one new token each.
    """

    query_starts: npt.NDArray[np.int32]  # [num_rows + 1]
    context_lens: npt.NDArray[np.int32]  # [num_rows] tokens in the cache once this step's are written
    block_tables: npt.NDArray[np.int32]  # [num_rows, max_blocks], padded with 0
    slot_mapping: npt.NDArray[np.int64]  # [num_tokens] block · block_size + offset of each new token
    num_decode_rows: int


class AttentionBackend(Protocol):
    """Writes this step's K and V at slot_mapping, then attends causally over each row's block table."""

    def __call__(
        self,
        q: Tensor,  # [num_tokens, num_heads, head_dim]
        k: Tensor,  # [num_tokens, num_kv_heads, head_dim]
        v: Tensor,  # [num_tokens, num_kv_heads, v_head_dim]
        layer: KVLayer,
        metadata: AttentionMetadata,
        *,
        scale: float,
        sliding_window: int | None,  # a token sees itself and the sliding_window - 1 before it
        softcap: float | None,  # scores become softcap · tanh(scores / softcap)
        sinks: Tensor | None = None,  # [num_heads] a score beside each head's, whose weight falls away; never capped
    ) -> Tensor: ...  # [num_tokens, num_heads, v_head_dim]


class StepContext:
    """Holds the metadata of the forward pass under way; refuses to nest."""

    def __init__(self, backend: AttentionBackend) -> None:
        self.backend = backend
        self._metadata: AttentionMetadata | None = None

    @property
    def metadata(self) -> AttentionMetadata:
        if self._metadata is None:
            raise RuntimeError("attention was called outside a step: run the model through ModelRunner.execute")
        return self._metadata

    @contextmanager
    def running(self, metadata: AttentionMetadata) -> Iterator[None]:
        if self._metadata is not None:
            raise RuntimeError("a step is already running on this model")
        self._metadata = metadata
        try:
            yield
        finally:
            self._metadata = None


@dataclass(slots=True)
class LayerBinding:
    """What one attention module needs from us. `kv` is None until the cache exists; `calls` lets the probe count."""

    context: StepContext
    kv: KVLayer | None = None
    calls: int = 0


def bind(module: nn.Module, binding: LayerBinding) -> None:
    """Hang `binding` on an attention module, outside state_dict and parameters."""
    object.__setattr__(module, _BINDING, binding)


def attention(
    module: nn.Module,
    query: Tensor,  # [1, num_heads, num_tokens, head_dim]
    key: Tensor,  # [1, num_kv_heads, num_tokens, head_dim]
    value: Tensor,  # [1, num_kv_heads, num_tokens, v_head_dim]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,  # [num_heads] attention sinks
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The function transformers calls for every layer; returns [1, num_tokens, num_heads, v_head_dim]."""
    if position_bias is not None:
        raise NotImplementedError(
            f"{type(module).__name__} adds a position bias of {tuple(position_bias.shape)} to its scores, which paged "
            "attention does not compute; this architecture is not served"
        )
    binding: LayerBinding = getattr(module, _BINDING)
    binding.calls += 1
    assert binding.kv is not None and attention_mask is None
    out = binding.context.backend(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        binding.kv,
        binding.context.metadata,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return out.unsqueeze(0), None
