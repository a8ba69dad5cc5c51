"""What the tensors of an adapter's files mean, in the files' own names: what every reader of a format produces.

A proposal is made from config and header alone; it names each tensor once, as an input of something or as dropped, and
placing it on a base (placement.py) fails for a tensor that it leaves out. Knows nothing of bases, files or data.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from torch import Tensor

Fold = Callable[[Sequence[Tensor], int, int], tuple[Tensor, Tensor]]
"""(tensors as stored, in the order of `inputs`, in_features, out_features) → A [r, in] and PEFT's B [out, r], in
float32, before the scale. A pure function of the module that defines it, or a partial of one, so that plans compare."""

Fits = Callable[[int, int], bool]
"""(in_features, out_features) of the base → whether the stored shapes fit them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairProposal:
    """A low-rank pair of one linear, or of the head."""

    source: str  # the module as the files call it
    inputs: tuple[str, ...]  # names of tensors: A, B, and what the fold takes beside them
    scale: float  # s, multiplied into B after the fold
    lora_rank: int  # after the fold
    declared_rank: int | None = None  # what the config says the stored rank is; None: it says nothing
    stored_rank: int | None = None  # before the fold, where that is another
    in_features: int | None = None  # what the stored shapes say; None: whatever the base has
    out_features: int | None = None
    fits: Fits | None = None  # what the widths above cannot say; asked before the fold
    fold: Fold | None = None  # None: inputs are A [r, in] and B [out, r] as PEFT stores them
    magnitude: str | None = None  # DoRA's [out]
    gain_covers_bias: bool = False  # torchtune's DoRA: the magnitude's gain scales the base's bias, too
    is_interleaved: bool = False  # torchtune's magnitudes of queries and keys: a head's rows in rotary pairs
    bias: str | None = None  # B's own [out], scaled as B is


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingProposal:
    """A low-rank pair of an embedding."""

    source: str
    lora_a: str  # lora_embedding_A [r, V']
    lora_b: str  # lora_embedding_B [hidden, r]
    scale: float
    lora_rank: int
    declared_rank: int | None = None
    is_transposed: bool = False  # MLX: A [V', r], B [r, hidden]
    on_tied_head: bool = False  # MLX: a tied head has it, too
    magnitude: str | None = None  # DoRA's [hidden]


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorProposal:
    """`bias`: the base's bias, or a norm's, is replaced by it; `norm`: a norm's weight is; `ia3`: outputs [out, 1] or
    inputs [1, in] are multiplied by it, as its shape says."""

    kind: Literal["bias", "norm", "ia3"]
    source: str
    input: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeProposal:
    """A whole module that replaces the base's, or, `is_copy`, one that was saved beside its pair and may be equal."""

    source: str
    weight: str | None
    bias: str | None = None
    is_copy: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensProposal:
    """Rows [n, hidden] that replace those of `ids`, in that order."""

    source: str
    input: str
    ids: tuple[int, ...]
    is_only: bool  # no other module has rows of its own, so a tied head has these, too


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertProposal:
    """A pair of fused experts. `form`: "rank_major" or "grouped_by_expert", as B holds the pairs of all of them,
    "single": of one expert's projection, or "stacked": of one projection of all, A [E, r, in] and B [E, out, r], of
    which one may have a single entry for every expert.
    """

    source: str  # the module that holds the experts
    parameter: str  # gate_up_proj or down_proj; of one expert, and stacked, gate, up or down
    inputs: tuple[str, ...]
    form: str
    scale: float
    lora_rank: int
    expert: int | None = None  # of "single"
    peft_version: tuple[int, int] | None = None  # what wrote it, where the config says


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    pairs: tuple[PairProposal, ...] = ()
    embeddings: tuple[EmbeddingProposal, ...] = ()
    vectors: tuple[VectorProposal, ...] = ()
    wholes: tuple[WholeProposal, ...] = ()
    tokens: tuple[TokensProposal, ...] = ()
    experts: tuple[ExpertProposal, ...] = ()
    invocation_tokens: tuple[int, ...] = ()
    dropped: tuple[str, ...] = ()  # tensors that change nothing at inference
    features: tuple[str, ...] = ()  # what goes beyond plain LoRA, for people
    warnings: tuple[str, ...] = ()


def joined(*proposals: Proposal) -> Proposal:
    """All of them, field by field in this order."""
    fields = Proposal.__dataclass_fields__
    return Proposal(**{name: tuple(chain.from_iterable(getattr(p, name) for p in proposals)) for name in fields})
