"""A proposal placed on a base, and how its tensors are read: everything that can be known without a byte of data.

Plain values, so that adapters whose headers and configs are equal share one plan. Knows no open file and no tensor.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from adapters.base_parts import Rows
from adapters.header_table import HeaderTable, StoredTensor
from adapters.host_memory import ALIGNMENT
from adapters.module_names import BaseModules
from adapters.packed_modules import PackedLayout, kind_of, layout_of
from adapters.place_experts import PlacedExperts
from adapters.proposal import EmbeddingProposal, PairProposal
from adapters.safetensors_header import TORCH_DTYPES
from adapters.tensor_pieces import Piece, plan_pieces
from adapters.tensor_runs import NormGroup, Run, RunPart, plan_norms, plan_runs

Part = Literal["embedding", "head"]


@dataclass(frozen=True, slots=True)
class RowsVector:
    """A vector for some outputs of a linear, [begin, end) each; `rows` None: for all of them."""

    input: str
    rows: Rows | None = None
    scale: float = 1.0
    taken: tuple[int, int, int] | None = None  # [begin, end) of the stored vector of that size; None: all of it
    interleaved: int | None = None  # elements of a head, whose halves stand in turns in the file

    def index(self) -> Tensor | slice:
        """Of the outputs, in the order of the vector."""
        return slice(None) if self.rows is None else torch.cat([torch.arange(*ends) for ends in self.rows])

    def stored_size(self, out_features: int) -> int:
        if self.taken is not None:
            return self.taken[2]
        return out_features if self.rows is None else sum(end - begin for begin, end in self.rows)

    def of(self, stored: Tensor) -> Tensor:
        """[n], of what the file holds."""
        if (
            self.interleaved is not None
        ):  # two of a rotary pair beside each other → a head's first half, then its second
            return stored.view(-1, self.interleaved // 2, 2).transpose(1, 2).flatten()
        return stored if self.taken is None else stored[self.taken[0] : self.taken[1]]


@dataclass(frozen=True, slots=True)
class PlacedPair:
    """A pair on the linear, or head, `module` of the base. `of_parts`: magnitudes, and biases of B, in place of the
    pair's own, where the file's linears are others: parts of this one, or a wider one that this is a part of."""

    module: str
    pair: PairProposal
    in_features: int
    out_features: int
    of_parts: tuple[tuple[RowsVector, ...], tuple[RowsVector, ...]] = ((), ())

    @property
    def magnitudes(self) -> tuple[RowsVector, ...]:
        own = self.pair.magnitude
        return self.of_parts[0] if own is None else (RowsVector(own),)

    @property
    def biases(self) -> tuple[RowsVector, ...]:
        """Of B."""
        own = self.pair.bias
        return self.of_parts[1] if own is None else (RowsVector(own, scale=self.pair.scale),)

    @property
    def is_copied(self) -> bool:
        """A and B are what the files hold, in another dtype and orientation."""
        return self.pair.fold is None and not self.magnitudes

    @property
    def inputs(self) -> tuple[str, ...]:
        """What must be there at once to compute A and B."""
        return (*self.pair.inputs, *(magnitude.input for magnitude in self.magnitudes))


@dataclass(frozen=True, slots=True)
class PlacedVector:
    """`lora_bias`: B's own, to be scaled, for the outputs that `part` says; `bias`: replaces that of the linear `name`;
    `norm`: replaces the parameter `name`; `head_bias`: replaces the head's; `gain` and `input_scale`: IA3's on the
    linear `name`."""

    kind: Literal["lora_bias", "bias", "norm", "head_bias", "gain", "input_scale"]
    name: str
    input: str
    scale: float = 1.0
    part: RowsVector | None = None


@dataclass(frozen=True, slots=True)
class PlacedRows:
    """Rows of a part of the base that are replaced: all of them (`ids` None) or those of `ids`, in that order."""

    part: Part
    input: str
    ids: tuple[int, ...] | None = None
    is_copy: bool = False  # saved beside a pair, and perhaps as the base has it


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where everything that a proposal names goes."""

    pairs: tuple[PlacedPair, ...] = ()
    vectors: tuple[PlacedVector, ...] = ()
    rows: tuple[PlacedRows, ...] = ()
    embedding: EmbeddingProposal | None = None
    experts: tuple[PlacedExperts, ...] = ()
    vocab_size: int | None = None  # None: the base's
    invocation_tokens: tuple[int, ...] = ()
    rewrite: str = ""  # the exchange of prefixes that was made
    features: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Nothing but pairs that are copied."""
        has_more = self.vectors or self.rows or self.embedding or self.experts
        return not has_more and all(pair.is_copied for pair in self.pairs)

    @property
    def adapted(self) -> list[str]:
        """Modules with a pair or a vector, as the files or as the base call them."""
        embedding = [] if self.embedding is None else [self.embedding.source]
        pairs = [each.pair.source for each in self.pairs] + [each.pair.source for each in self.experts]
        return [*pairs, *embedding, *(name for v in self.vectors for name in (v.name, v.name.rpartition(".")[0]))]

    @property
    def needs_weights(self) -> bool:
        """Whether it is computed from the base's own weights."""
        has_gain = any(pair.magnitudes for pair in self.pairs)
        has_gain = has_gain or (self.embedding is not None and self.embedding.magnitude is not None)
        replaces = any(vector.kind == "bias" for vector in self.vectors) or any(r.ids is None for r in self.rows)
        return has_gain or replaces


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    base: BaseModules
    placement: Placement
    layout: PackedLayout
    tensors: Mapping[str, StoredTensor] = field(repr=False)
    declared: bytes = field(repr=False)  # names, dtypes and shapes of these tensors: HeaderTable.declared
    ignored: Mapping[str, int] = field(repr=False)  # tensors of the files that are not read → bytes
    pieces: tuple[Piece, ...] = field(repr=False)
    runs: tuple[tuple[Run, ...], ...] = field(repr=False)  # by piece
    kept: frozenset[str] = field(repr=False)  # tensors that are not copied by a run, but computed from
    norm_groups: tuple[NormGroup, ...] = field(repr=False)

    @property
    def num_bytes(self) -> int:
        """About what the plan itself takes, for whoever keeps plans."""
        return 1200 * len(self.tensors) + 200 * len(self.ignored) + 400 * len(self.layout.places)


def plan_load(
    placement: Placement,
    table: HeaderTable,
    base: BaseModules,
    dtype: torch.dtype,
    *,
    ignored: Mapping[str, int] = MappingProxyType({}),
) -> LoadPlan:
    """How the tensors of `table` are read into a model of `dtype`."""
    pairs = placement.pairs
    shapes = ((pair.module, pair.pair.lora_rank, pair.in_features, pair.out_features) for pair in pairs)
    layout = layout_of(shapes, align=ALIGNMENT // dtype.itemsize)
    copied: dict[str, tuple[PlacedPair, float | None]]
    copied = {pair.pair.inputs[0]: (pair, None) for pair in pairs if pair.is_copied}
    copied |= {pair.pair.inputs[1]: (pair, pair.pair.scale) for pair in pairs if pair.is_copied}
    pieces = plan_pieces(table.tensors.values())
    return LoadPlan(
        base=base,
        placement=placement,
        layout=layout,
        tensors=table.tensors,
        declared=table.declared(),
        ignored=ignored,
        pieces=pieces,
        runs=tuple(plan_runs(_parts(piece, copied, table, layout)) for piece in pieces),
        kept=frozenset(table.tensors.keys() - copied.keys() - set(placement.dropped)),
        norm_groups=plan_norms(layout),
    )


def _parts(
    piece: Piece, copied: Mapping[str, tuple[PlacedPair, float | None]], table: HeaderTable, layout: PackedLayout
) -> Iterator[RunPart]:
    for name, begin in zip(piece.names, piece.begins, strict=True):
        if name in copied:
            (pair, scale), entry = copied[name], table.tensors[name].entry
            dtype, place = TORCH_DTYPES[entry.dtype], layout.places[pair.module]
            (rows, columns), to_begin = entry.shape, place.a_begin if scale is None else place.b_begin
            yield RunPart(kind_of(pair.module), dtype, rows, columns, scale, begin // dtype.itemsize, to_begin)
