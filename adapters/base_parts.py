"""Parts of a base model that adapters change besides linears: their names and shapes, no weights."""

from dataclasses import dataclass

Rows = tuple[tuple[int, int], ...]
"""[begin, end) of a linear's outputs, in order."""


@dataclass(frozen=True, slots=True)
class EmbeddingShape:
    """The input embedding: [num_rows, width], every lookup multiplied by `scale`."""

    name: str
    num_rows: int
    width: int
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class HeadShape:
    """The output layer [out_features, in_features]; `is_tied`: its weight is the input embedding's."""

    name: str
    in_features: int
    out_features: int
    has_bias: bool = False
    is_tied: bool = False


@dataclass(frozen=True, slots=True)
class NormShape:
    """A norm y = x̂ ⊙ (offset + weight) + bias whose parameters have `shape`."""

    shape: tuple[int, ...]
    offset: float = 0.0
    has_bias: bool = False


@dataclass(frozen=True, slots=True)
class ExpertsShape:
    """Fused experts: gate_up_proj [E, 2·intermediate, hidden] and down_proj [E, hidden, intermediate], or with the last
    two swapped where `is_transposed`; gate and up in halves, or in turns where `is_interleaved`.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    is_transposed: bool = False
    is_interleaved: bool = False


@dataclass(frozen=True, slots=True)
class FusedPart:
    """A linear that a base computes as some rows of a wider one: q of a fused qkv."""

    name: str  # its last part in models that do not fuse it, such as q_proj
    rows: Rows  # of the wider one's outputs
