"""A norm whose parameters are replaced for the rows of some adapters: its own output, corrected by two vectors, or
computed anew where the base's weight is too near to 0 to tell.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from adapters.class_swap import STATE
from adapters.hosted_rows import blend
from adapters.lora_step import Step
from adapters.ops import BoundAffine
from adapters.staged_extras import StagedExtras
from adapters.step_features import StepFeature


class NormSite:
    """One norm of the model."""

    def __init__(
        self, step: Step, norm: nn.Module, forward: Callable[..., Tensor], shape: tuple[int, ...], bound: BoundAffine
    ) -> None:
        self.step = step
        self.forward = forward  # without adapters
        self.touched: set[int] = set()  # first rows of adapters with vectors here
        self.exact: dict[int, Mapping[str, Tensor]] = {}  # first row → parameters in place of the norm's
        self._shape = shape  # of the parameters
        self._bound = bound
        self._stock = copy.copy(norm)  # of the class it had; its parameters are exchanged for the length of a call
        self._stock.__dict__["_parameters"] = dict(norm._parameters)

    def clear(self, start: int) -> None:
        self.touched.discard(start)
        self.exact.pop(start, None)

    def correct(self, y: Tensor, x: Tensor, extras: StagedExtras) -> Tensor:
        """y as the step's adapters have it."""
        is_exact = bool(self.exact) and bool(extras.features & StepFeature.EXACT_NORM)
        is_affine = extras.affine is not None and bool(self.touched or self.step.everywhere)
        if not (is_exact or is_affine):
            return y
        axis = _token_axis(x, len(self._shape), extras.num_tokens)
        y = y.movedim(axis, 0).contiguous()
        if is_exact:
            self._norm_anew(y, x.movedim(axis, 0), extras)
        if is_affine:
            self._bound.apply([y], extras.affine)
        return y.movedim(0, axis)

    def _norm_anew(self, y: Tensor, x: Tensor, extras: StagedExtras) -> None:
        """y and x [num_tokens, …]; rows of adapters with other parameters."""

        def own(start: int, rows: Tensor) -> Tensor | None:
            parameters = self.exact.get(start)
            if parameters is None:
                return None
            found: Tensor = functional_call(self._stock, dict(parameters), (x_rows[rows],))
            return found.float()

        x_rows = x.reshape(extras.num_tokens, -1, *self._shape)
        blend(y.view(x_rows.shape), extras.batch.tokens, own)


class LoRANorm(nn.Module):
    """Mixed in before a norm's own class."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        site: NormSite = self.__dict__[STATE]
        y = site.forward(x, *args, **kwargs)
        extras = site.step.extras
        return y if extras is None else site.correct(y, x, extras)


def _token_axis(x: Tensor, num_own: int, num_tokens: int) -> int:
    """Which axis of x counts the step's tokens: [1, tokens, …], or [1, heads, tokens, …] of a query in heads. Where two
    are as long, the one with the longer stride: what a linear gave holds its tokens one after the other."""
    axes = [axis for axis in range(x.ndim - num_own) if x.shape[axis] == num_tokens]
    if num_tokens == 1 or not axes:  # [tokens · heads, …] has none; whoever needs the tokens checks the number
        return 0
    return max(axes, key=x.stride)
