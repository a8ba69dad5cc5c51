"""What a conversion gives: a PEFT adapter, and what the source adds to each module, computed another way.

The second is what the written adapter is measured against, so it must not be made of the first.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

RowsOf = Callable[[int, int], Tensor]
"""(begin, end) → rows [begin, end) of a ΔW [out, in], float64."""

Progress = Callable[[str, int, int], None]
"""(what is being done, how many of it are done, how many there are)"""


def no_progress(what: str, done: int, total: int) -> None:
    """For callers whom nobody watches."""


@dataclass(frozen=True, slots=True)
class SourceDelta:
    """ΔW [out, in] of a linear or ΔE [V, H] of an embedding, as the source defines it. `make` may take long, and what
    it holds is let go with the rows it gives."""

    num_rows: int
    width: int
    make: Callable[[], RowsOf]

    @classmethod
    def of_product(cls, scale: float, left: Tensor, right: Tensor) -> "SourceDelta":
        """scale · left [out, r] · right [r, in]"""

        def rows(begin: int, end: int) -> Tensor:
            return scale * (left[begin:end].double() @ right.double())

        return cls(left.shape[0], right.shape[1], lambda: rows)


@dataclass(frozen=True, slots=True)
class Conversion:
    """`deltas` by module, as the written file calls it without its wrappers. `kept` by the whole name: tensors that are
    to be in the file as they were in the source."""

    config: Mapping[str, object]
    tensors: Mapping[str, Tensor]
    deltas: Mapping[str, SourceDelta]
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def in_dtype(self, dtype: torch.dtype) -> "Conversion":
        cast = {name: tensor.to(dtype) for name, tensor in self.tensors.items()}
        return Conversion(self.config, cast, self.deltas, self.kept, self.warnings)
