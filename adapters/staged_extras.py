"""A step's extras where the model's modules find them during the forward pass. Knows no module."""

from dataclasses import dataclass
from typing import Any

from adapters.extras_batch import ExtrasBatch
from adapters.step_features import StepFeature


@dataclass(slots=True, eq=False)
class StagedExtras:
    """`affine` is what AffineOps.stage_affine gave, None in a step without affine vectors; `num_tokens` those of the
    step."""

    batch: ExtrasBatch
    num_tokens: int
    affine: Any

    @property
    def features(self) -> StepFeature:
        return self.batch.features

    def become(self, other: "StagedExtras") -> None:
        """Let recorded operations, which read this one, read what `other` reads; both have the same features."""
        assert self.features == other.features and self.num_tokens == other.num_tokens
        self.batch = other.batch
        if self.affine is not None:
            self.affine.become(other.affine)
