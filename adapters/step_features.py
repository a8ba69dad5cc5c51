"""What a step has to do beyond adding low-rank deltas to linears. Knows no tensors and no adapters."""

from enum import IntFlag, auto


class StepFeature(IntFlag):
    """Present when a row of the step needs it; an adapter's features are those its rows need."""

    AFFINE = auto()  # outputs of linears and norms scaled and shifted
    EMBEDDING = auto()  # the input embedding
    HEAD = auto()  # the output layer
    WIDE_LOGITS = auto()  # more columns of logits than the base has
    INPUT_SCALE = auto()  # inputs of linears scaled before the base's product
    EXACT_NORM = auto()  # norms computed anew from other parameters
    EXPERTS = auto()


NO_FEATURES = StepFeature(0)
RECORDABLE = StepFeature.AFFINE | StepFeature.EMBEDDING | StepFeature.HEAD
"""Steps that need nothing else can be played from a recording."""

HOSTED_BY_TOKEN = StepFeature.EMBEDDING | StepFeature.INPUT_SCALE | StepFeature.EXACT_NORM | StepFeature.EXPERTS
"""Computed in plain torch for the tokens that need it."""
