"""Pairs of q, k and v, or gate and up, on a base that computes them as rows of one wider linear, and the other way.

Each part keeps its ranks: A is theirs one below the other, B is zero but where a part's rows meet its ranks. A part's
magnitude, or bias of B, is for its rows. The other way each part has the whole A and its rows of B, magnitude and
bias. Knows nothing of formats, files or data.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from adapters.base_parts import FusedPart, Rows
from adapters.joint_names import joint_names
from adapters.load_plan import PlacedPair
from adapters.module_names import BaseModules, LinearShape
from adapters.proposal import Fold, PairProposal


@dataclass(frozen=True, slots=True)
class FusedPlace:
    """Which rows of which linear a part is."""

    linear: str
    shape: LinearShape  # of the part
    rows: Rows


@dataclass(frozen=True, slots=True)
class _Part:
    """How one part's tensors become its pair, and where that stands in the wider one."""

    num_inputs: int
    fold: Fold | None
    scale: float
    shape: LinearShape
    rows: Rows


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
    """The pair of the wider linear that its parts' pairs are together."""
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
        gain_covers_bias=any(each.pair.gain_covers_bias for _, each in parts),
    )
    magnitudes = tuple(replace(v, rows=place.rows) for place, each in parts for v in each.magnitudes)
    biases = tuple(replace(v, rows=place.rows) for place, each in parts for v in each.biases)
    return PlacedPair(linear, pair, shape.in_features, shape.out_features, (magnitudes, biases))


def split_pair(placed: PlacedPair, parts: Sequence[str], base: BaseModules) -> Iterator[PlacedPair]:
    """A pair of a wider linear that the base has not → those of its `parts`, whose outputs are the wider one's."""
    pair, begin = placed.pair, 0
    for part in parts:
        end = begin + base.linears[part].out_features
        taken = (begin, end, placed.out_features)
        magnitudes = tuple(replace(vector, taken=taken) for vector in placed.magnitudes)
        biases = tuple(replace(vector, taken=taken) for vector in placed.biases)
        fold = partial(_rows_of_b, fold=pair.fold, taken=taken)
        own = replace(pair, fold=fold, magnitude=None, bias=None, out_features=end - begin)
        yield PlacedPair(part, own, placed.in_features, end - begin, (magnitudes, biases))
        begin = end


def joint_places(base: BaseModules) -> dict[str, tuple[LinearShape, tuple[str, ...]]]:
    """Name of a wider linear that the base has not → its shape and those it has in its place."""
    found = {}
    for name, parts in joint_names(base.linears).items():
        shapes = [base.linears[part] for part in parts]
        if len({shape.in_features for shape in shapes}) == 1:
            found[name] = LinearShape(shapes[0].in_features, sum(shape.out_features for shape in shapes)), parts
    return found


def _rows_of_b(
    tensors: Sequence[Tensor], in_features: int, out_features: int, *, fold: Fold | None, taken: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] of a part: out_features is its own."""
    begin, end, num_rows = taken
    lora_a, lora_b = tensors if fold is None else fold(tensors, in_features, num_rows)
    return lora_a, lora_b[begin:end]


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
