"""Fused experts of a model, each token computed with what its adapters hold, and to the same bits in any company.

y_e = gate(x · W_eᵀ + b_e + Σ_k w_k (x · a_k[e]ᵀ) · b_k[e]) and likewise down, weighted and summed over a token's
experts. Which tokens an expert meets depends on everybody's routing, so nothing here may depend on how many there are:
products are made by who promises that, activations in tiles of one size, sums slot by slot. Knows nothing of requests.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from adapters.adapter_extras import ExpertPair, ExpertPairs
from adapters.expert_groups import ExpertGroups
from adapters.expert_sites import ExpertsPart, ExpertsSite
from adapters.host_call import host_call
from adapters.ops import product
from adapters.staged_extras import StagedExtras

_BOUND = "loramux_experts"
_TILE_ELEMENTS = 1 << 14  # of an activation: fewer than torch shares out among threads
_TILE_ROWS = 8  # at least, and a divisor: whole vectors, where sizes are even


class ExpertProduct(Protocol):
    def __call__(self, x: Tensor, groups: ExpertGroups) -> Tensor:
        """x [num_rows, in], row by row as `groups` has them → [num_rows, out], each times its expert's weight, with
        the bias; in the dtype of x. A row's bits depend on nothing but the row and its expert."""


class FusedExperts:
    """What the experts `module` of transformers computes, by these products of its gate_up_proj and down_proj.

    `stock`: its own way, which tokens without pairs then take; those with pairs are computed once more.
    """

    def __init__(
        self,
        module: nn.Module,
        gate_up: ExpertProduct,
        down: ExpertProduct,
        stock: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        own: Any = module
        self._num_experts = len(own.gate_up_proj)
        self._apply_gate: Callable[[Tensor], Tensor] = own._apply_gate
        self._gate_up, self._down, self._stock = gate_up, down, stock
        self.site: ExpertsSite | None = None

    def __call__(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """x [num_tokens, hidden] → the same; what the router chose has [num_tokens, k]."""
        extras = None if self.site is None else self.site.extras
        if self._stock is None:
            y = torch.empty_like(x)
            host_call(partial(self._write, extras), y, x, top_k_index, top_k_weights)
            return y
        y = self._stock(x, top_k_index, top_k_weights)
        if extras is not None:
            host_call(partial(self._replace, extras), y, x, top_k_index, top_k_weights)
        return y

    def run(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, parts: Sequence[ExpertsPart] = ()) -> Tensor:
        groups = ExpertGroups.of(top_k_index, self._num_experts)
        added = [_Added.of(part, groups, len(x)) for part in parts]
        rows = x[groups.tokens]  # [num_rows, hidden]
        h = self._gate_up(rows, groups)  # [num_rows, 2 · intermediate]
        for each in added:
            each.add(h, rows, each.pairs.gate_up)
        h = _in_tiles(self._apply_gate, h)
        y = self._down(h, groups)  # [num_rows, hidden]
        for each in added:
            each.add(y, h, each.pairs.down)
        return _summed(y, groups, top_k_weights).to(x.dtype)

    def _write(
        self, extras: StagedExtras | None, y: Tensor, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> None:
        parts = () if extras is None or self.site is None else self.site.parts(extras, x)
        y.copy_(self.run(x, top_k_index, top_k_weights, parts))

    def _replace(self, extras: StagedExtras, y: Tensor, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> None:
        """Compute the tokens that have pairs."""
        assert self.site is not None
        parts = self.site.parts(extras, x)
        if not parts:
            return
        rows = torch.cat([part.tokens for part in parts]).unique()  # ascending
        own = [ExpertsPart(part.weight, part.pairs, torch.searchsorted(rows, part.tokens)) for part in parts]
        y[rows] = self.run(x[rows], top_k_index[rows], top_k_weights[rows], own)


def bind_experts(module: nn.Module, fused: FusedExperts) -> None:
    module.__dict__[_BOUND] = fused


def bound_experts(module: nn.Module) -> FusedExperts | None:
    found: FusedExperts | None = module.__dict__.get(_BOUND)
    return found


class PlainProduct:
    """By the module's own parameters, wherever they lie, a few rows at a time."""

    def __init__(self, module: nn.Module, parameter: str) -> None:
        self._module: Any = module
        self._name = parameter

    def __call__(self, x: Tensor, groups: ExpertGroups) -> Tensor:
        weight = getattr(self._module, self._name)
        weight = weight.transpose(1, 2) if self._module.is_transposed else weight  # [E, out, in]
        bias = getattr(self._module, f"{self._name}_bias") if self._module.has_bias else None  # [E, out]
        y = x.new_empty(len(x), weight.shape[1])
        for expert, begin, end in groups.groups.tolist():
            found = product(x[begin:end], weight[expert])  # float32
            y[begin:end] = found if bias is None else found + bias[expert]
        return y


@dataclass(frozen=True, slots=True, eq=False)
class _Added:
    """A part by the rows that experts compute."""

    weight: float
    pairs: ExpertPairs
    rows: Tensor  # int64, ascending: those of the part's tokens
    groups: ExpertGroups  # of `rows`

    @classmethod
    def of(cls, part: ExpertsPart, groups: ExpertGroups, num_tokens: int) -> "_Added":
        has_it = torch.zeros(num_tokens, dtype=torch.bool, device=groups.tokens.device)
        has_it[part.tokens] = True
        rows = has_it[groups.tokens].nonzero()[:, 0]
        return cls(part.weight, part.pairs, rows, groups.within(rows))

    def add(self, y: Tensor, x: Tensor, pair: ExpertPair | None) -> None:
        """y [num_rows, out] += weight · (x [num_rows, in] · a[e]ᵀ) · b[e], in place."""
        if pair is None:
            return
        for expert, begin, end in self.groups.groups.tolist():
            rows = self.rows[begin:end]
            low = product(x[rows], pair.a[expert].to(x.dtype)).to(x.dtype)  # [n, r]
            delta = product(low, pair.b[expert].to(x.dtype).T)  # float32 [n, out]
            y[rows] = (y[rows].float() + self.weight * delta).to(y.dtype)


def _in_tiles(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function` of the rows of x, with as many at once however many there are: torch computes the last elements of a
    tensor by other code, and shares larger ones out among threads wherever that cuts them."""
    size = max(_TILE_ROWS, _TILE_ELEMENTS // x.shape[1] // _TILE_ROWS * _TILE_ROWS)
    num_rows = len(x)
    padded = x.new_zeros(-(-num_rows // size) * size, x.shape[1])
    padded[:num_rows] = x
    return torch.cat([function(tile) for tile in padded.split(size)])[:num_rows]


def _summed(y: Tensor, groups: ExpertGroups, weights: Tensor) -> Tensor:
    """The rows y [num_rows, hidden] of each token, times weights [num_tokens, k], slot after slot: float32
    [num_tokens, hidden]."""
    num_tokens, num_slots = weights.shape
    by_slot = y.new_zeros(num_tokens * num_slots, y.shape[1])
    by_slot[groups.places] = y
    by_slot = by_slot.view(num_tokens, num_slots, -1)
    out = torch.zeros(num_tokens, y.shape[1], device=y.device)
    for slot in range(num_slots):
        out += by_slot[:, slot].float() * weights[:, slot, None].float()
    return out
