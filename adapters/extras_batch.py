"""Which tokens of a step need more than low-rank deltas, and of whom. Integers and numpy; no torch, no adapters.

An adapter stands for the first of its pool rows, as in LoRABatch, from which all of this follows.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adapters.lora_batch import LoRABatch
from adapters.step_features import HOSTED_BY_TOKEN, NO_FEATURES, StepFeature

IntArray = npt.NDArray[np.int64]
IntArray32 = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class ExtraRows:
    """Rows that use one adapter with one weight, no two alike. `is_alone`: none uses another adapter of the same
    kind of features."""

    start: int
    weight: float
    rows: IntArray  # [num_rows] tokens, or rows of the head's input, ascending
    is_alone: bool


@dataclass(frozen=True, slots=True, eq=False)
class ExtrasBatch:
    """What a step has beside its LoRABatch. There is none for a step in which no row needs it."""

    features: StepFeature
    affine_tokens: IntArray32  # [num_affine] tokens that an adapter with affine vectors acts on
    tokens: tuple[ExtraRows, ...]  # adapters with features that are hosted by token, those of a token as it names them
    kept: tuple[ExtraRows, ...]  # adapters with a head, by the rows of the head's input
    num_head_rows: int
    foreign_ids: tuple[tuple[int, int], ...] = ()  # (token, id) beyond the base's embedding; `input_ids` has 0 there
    num_columns: int | None = None  # of the logits, where that is more than the base's

    @classmethod
    def build(
        cls,
        lora: LoRABatch,
        head_rows: IntArray,
        features_at: Callable[[int], StepFeature],
        columns_at: Callable[[int], int | None],
        foreign_ids: tuple[tuple[int, int], ...] = (),
    ) -> "ExtrasBatch | None":
        """None when no token's adapters have any feature. `head_rows` [num_head_rows] are the tokens that the head
        sees, in its order; `columns_at` tells the logits of an adapter that has more of them than the base."""
        by_start = {start: features_at(start) for start in np.unique(lora.starts).tolist()}
        features = NO_FEATURES
        for found in by_start.values():
            features |= found
        if not features:
            return None
        wants = np.zeros(int(lora.starts.max()) + 1, np.int64)  # features by first pool row
        wants[list(by_start)] = [int(found) for found in by_start.values()]
        columns = [columns for columns in map(columns_at, by_start) if columns is not None]
        return cls(
            features=features,
            affine_tokens=_tokens_with(lora, wants, StepFeature.AFFINE),
            tokens=_by_adapter(lora, wants, HOSTED_BY_TOKEN, np.arange(lora.num_tokens)),
            kept=_by_adapter(lora, wants, StepFeature.HEAD, head_rows),
            num_head_rows=len(head_rows),
            foreign_ids=foreign_ids,
            num_columns=max(columns, default=None),
        )


def _tokens_with(lora: LoRABatch, wants: IntArray, feature: StepFeature) -> IntArray32:
    entries = (wants[lora.starts] & int(feature)) != 0  # [nnz]
    tokens = np.repeat(np.arange(lora.num_tokens, dtype=np.int32), np.diff(lora.indptr))  # [nnz]
    return np.unique(tokens[entries])


def _by_adapter(lora: LoRABatch, wants: IntArray, feature: StepFeature, tokens: IntArray) -> tuple[ExtraRows, ...]:
    """The places of `tokens` whose adapters have the feature: by adapter and weight, and by its place among those of a
    token, since sums depend on the order and a token's are not to depend on its neighbours."""
    found: defaultdict[tuple[int, int, float, bool], list[int]] = defaultdict(list)
    has_it = (wants[lora.starts] & int(feature)) != 0  # [nnz]
    if not has_it.any():
        return ()
    for place, token in enumerate(tokens.tolist()):
        entries = range(int(lora.indptr[token]), int(lora.indptr[token + 1]))
        wanted = [entry for entry in entries if has_it[entry]]
        for number, entry in enumerate(wanted):
            found[number, int(lora.starts[entry]), float(lora.weights[entry]), len(wanted) == 1].append(place)
    return tuple(
        ExtraRows(start, weight, np.array(places, np.int64), is_alone)
        for (_, start, weight, is_alone), places in sorted(found.items(), key=lambda item: item[0][0])
    )
