"""What the forward pass under way applies. All swapped modules of a model read one; knows none of them."""

from dataclasses import dataclass
from typing import Any

from adapters.staged_extras import StagedExtras


@dataclass(slots=True)
class Step:
    """None outside a forward pass and in a step of base rows only."""

    batch: Any = None  # as LoRAOps.stage gave it
    extras: StagedExtras | None = None  # None when all that the step's adapters have is low-rank pairs of linears
    is_running: bool = False
    everywhere: bool = False  # apply in modules that no adapter targets, too
