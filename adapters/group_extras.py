"""What adapters change in linears that read one input, beside their low-rank deltas: outputs scaled and shifted, inputs
scaled before the base's product. Knows nothing of adapters' names, row ranges or eviction.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from adapters.ops import BoundAffine
from adapters.staged_extras import StagedExtras
from adapters.step_features import StepFeature


class GroupExtras:
    """`forwards` are those of the linears without any adapter."""

    __slots__ = ("_bound", "_forwards", "_input_deltas", "touched")

    def __init__(self, bound: BoundAffine, forwards: Sequence[Callable[[Tensor], Tensor]]) -> None:
        self.touched: set[int] = set()  # first rows of adapters that change anything here
        self._bound = bound
        self._forwards = forwards
        self._input_deltas: list[dict[int, Tensor]] = [{} for _ in forwards]  # first row → l - 1, float32 [in]

    def write(self, start: int, input_deltas: Sequence[Tensor | None]) -> None:
        """An adapter that changes something here begins at pool row `start`; deltas are by linear."""
        self.touched.add(start)
        for table, delta in zip(self._input_deltas, input_deltas, strict=True):
            if delta is not None:
                table[start] = delta

    def clear(self, start: int) -> None:
        self.touched.discard(start)
        for table in self._input_deltas:
            table.pop(start, None)

    def apply(self, ys: Sequence[Tensor], x: Tensor, extras: StagedExtras) -> None:
        """Change the outputs of all linears in place."""
        deltas: list[_Deltas | None] = [None] * len(ys)
        if extras.features & StepFeature.INPUT_SCALE:
            parts = zip(ys, self._forwards, self._input_deltas, strict=True)
            deltas = [_scale_inputs(y, x, forward, table, extras) if table else None for y, forward, table in parts]
        if extras.affine is not None:
            self._bound.apply(ys, extras.affine)
        for y, found in zip(ys, deltas, strict=True):
            if found is not None:  # after the affine step, which is of the base's output alone
                tokens, delta = found
                rows = y.view(extras.num_tokens, -1)
                rows[tokens] = (rows[tokens].float() + delta).to(y.dtype)


_Deltas = tuple[Tensor, Tensor]
"""Tokens [n], and what is to be added to their outputs, float32 [n, out]."""


def _scale_inputs(
    y: Tensor, x: Tensor, forward: Callable[[Tensor], Tensor], table: dict[int, Tensor], extras: StagedExtras
) -> _Deltas | None:
    """base(x[t] ⊙ (1 + Σ_e weight_e · (l_e - 1))) - base(x[t]) for the tokens with such adapters; y is base(x)."""
    parts = [part for part in extras.batch.tokens if part.start in table]
    if not parts:
        return None
    x_rows = x.reshape(extras.num_tokens, -1)  # [num_tokens, in]
    tokens = torch.cat([torch.from_numpy(part.rows) for part in parts]).unique()
    place = torch.zeros(extras.num_tokens, dtype=torch.int64)
    place[tokens] = torch.arange(len(tokens))
    factors = torch.ones(len(tokens), x_rows.shape[1], device=x.device)  # float32
    for part in parts:
        factors[place[torch.from_numpy(part.rows)].to(x.device)] += part.weight * table[part.start]
    tokens = tokens.to(x.device)
    scaled = forward((x_rows[tokens].float() * factors).to(x.dtype))
    return tokens, scaled.float() - y.view(extras.num_tokens, -1)[tokens].float()
