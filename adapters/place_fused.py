"""Pairs of q, k and v, or gate and up, on a base that computes them as rows of one wider linear.

Each part keeps its ranks: A is theirs one below the other, B is zero but where a part's rows meet its ranks. Knows
nothing of formats, files or data.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from adapters.base_parts import FusedPart
from adapters.errors import AdapterRefused, RefusalCode
from adapters.load_plan import PlacedPair
from adapters.module_names import BaseModules, LinearShape
from adapters.proposal import Fold, PairProposal


@dataclass(frozen=True, slots=True)
class FusedPlace:
    """Which rows of which linear a part is."""

    linear: str
    shape: LinearShape  # of the part
    rows: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class _Part:
    """How one part's tensors become its pair, and where that stands in the wider one."""

    num_inputs: int
    fold: Fold | None
    scale: float
    shape: LinearShape
    rows: tuple[tuple[int, int], ...]


def fused_places(base: BaseModules) -> dict[str, FusedPlace]:
    """Name of a part as a model that does not fuse it calls it → its place."""
    return {name: place for linear in base.fused for name, place in _places_in(linear, base)}


def _places_in(linear: str, base: BaseModules) -> Iterator[tuple[str, FusedPlace]]:
    outer = linear.rpartition(".")[0]
    for part in base.fused[linear]:
        shape = LinearShape(base.linears[linear].in_features, _num_rows(part))
        yield f"{outer}.{part.name}", FusedPlace(linear, shape, part.rows)


def _num_rows(part: FusedPart) -> int:
    return sum(end - begin for begin, end in part.rows)


def join_parts(linear: str, parts: Sequence[tuple[FusedPlace, PlacedPair]], base: BaseModules) -> PlacedPair:
    """The pair of the wider linear that its parts' pairs are together. Raises AdapterRefused (adapter_unsupported)."""
    for _, placed in parts:
        vector = placed.pair.magnitude or placed.pair.bias
        if vector is not None:
            raise AdapterRefused(
                RefusalCode.UNSUPPORTED,
                f"{placed.module} is a part of the base's {linear}, and a magnitude or bias of a part is not served",
                "Train on a base that computes it by itself, or without DoRA and lora_bias",
                feature="use_dora" if placed.pair.magnitude is not None else "lora_bias",
                tensor=vector,
            )
    cut = tuple(
        _Part(len(each.pair.inputs), each.pair.fold, each.pair.scale, place.shape, place.rows) for place, each in parts
    )
    shape = base.linears[linear]
    pair = PairProposal(
        source=parts[0][1].pair.source,
        inputs=tuple(name for _, each in parts for name in each.pair.inputs),
        scale=1.0,
        lora_rank=sum(each.pair.lora_rank for _, each in parts),
        fold=partial(_stacked, parts=cut),
    )
    return PlacedPair(linear, pair, shape.in_features, shape.out_features)


def _stacked(
    tensors: Sequence[Tensor], in_features: int, out_features: int, *, parts: Sequence[_Part]
) -> tuple[Tensor, Tensor]:
    """A [Σr, in] and B [out, Σr] of parts' tensors one after the other, their scales in B."""
    pairs, begin = [], 0
    for part in parts:
        some = tensors[begin : begin + part.num_inputs]
        lora_a, lora_b = some if part.fold is None else part.fold(some, part.shape.in_features, part.shape.out_features)
        pairs.append((lora_a.float(), lora_b.float() * part.scale))
        begin += part.num_inputs
    whole_b, rank = torch.zeros(out_features, sum(len(lora_a) for lora_a, _ in pairs)), 0
    for part, (lora_a, lora_b) in zip(parts, pairs, strict=True):
        rows = torch.cat([torch.arange(*ends) for ends in part.rows])
        whole_b[rows, rank : rank + len(lora_a)] = lora_b
        rank += len(lora_a)
    return torch.cat([lora_a for lora_a, _ in pairs]), whole_b
