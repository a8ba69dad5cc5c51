"""What the parts of an adapter that are not copied are computed from, and a word to whoever waits for them.

Tensors as stored, and the base's weights. Knows nothing of what is computed.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.base_weights import BaseWeights
from adapters.load_plan import LoadPlan

logger = logging.getLogger(__name__)

Kept = dict[str, Tensor]
"""Tensor's name → the tensor as stored."""


@dataclass(slots=True)
class Sources:
    """What extras are computed from, and how far that is."""

    plan: LoadPlan
    kept: Mapping[str, Tensor]
    dtype: torch.dtype
    weights: BaseWeights | None
    max_full_bytes: int
    progress: Callable[[int, int], object] | None
    _rows_done: int = 0
    _num_rows: int = 0  # 0: not counted yet

    def floats(self, name: str) -> Tensor:
        return self.kept[name].float()

    def base(self) -> BaseWeights:
        assert self.weights is not None, "run_plan.py refuses what needs weights that are not there"
        return self.weights

    def on_rows(self, num_rows: int) -> None:
        """Of the base's weights, that gains were computed from."""
        self._rows_done += num_rows
        if self.progress is not None:
            self._num_rows = self._num_rows or self._count_rows()
            try:
                self.progress(self._rows_done, self._num_rows)
            except Exception:  # whoever watches, the load goes on
                self.progress = None
                logger.exception("the progress of a load is not told any more")

    def _count_rows(self) -> int:
        placement = self.plan.placement
        total = sum(pair.out_features for pair in placement.pairs if pair.magnitudes)
        if placement.embedding is not None and placement.embedding.magnitude is not None:
            total += self.kept[placement.embedding.lora_a].numel() // placement.embedding.lora_rank
        return total
