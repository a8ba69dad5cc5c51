"""An output layer that is another, or has other rows, gains or low-rank deltas, for the rows of some adapters.

Everything happens before what the model does to its logits (softcap, scale), since that follows what the head returns.
Columns that a row's adapters do not have are the base's, or 0 where the base has none: what may be sampled is not
decided here.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from adapters.applied_extras import AppliedHead
from adapters.base_parts import HeadShape
from adapters.class_swap import STATE
from adapters.host_call import host_call
from adapters.hosted_rows import blend
from adapters.lora_step import Step
from adapters.ops import product
from adapters.staged_extras import StagedExtras
from adapters.step_features import StepFeature


class HeadSite:
    def __init__(self, step: Step, forward: Callable[[Tensor], Tensor], shape: HeadShape, bias: Tensor | None) -> None:
        self.step = step
        self.forward = forward  # without adapters
        self.table: dict[int, AppliedHead] = {}  # by first pool row
        self._shape = shape
        self._bias = None if bias is None else bias.detach().float()  # [V]

    def widened(self, y: Tensor, extras: StagedExtras) -> Tensor:
        """y [.., V] as a tensor that may be written, with columns of zeros for the widest adapter of the step."""
        num_columns = extras.batch.num_columns
        if num_columns is None:
            return y.contiguous()
        wide = y.new_zeros(*y.shape[:-1], num_columns)
        wide[..., : y.shape[-1]] = y
        return wide

    def apply(self, extras: StagedExtras, y: Tensor, x: Tensor) -> None:
        """y [.., at least V] is the base's output for x [.., hidden]."""
        x_rows, y_rows = x.reshape(-1, self._shape.in_features), y.view(-1, y.shape[-1])
        if len(x_rows) != extras.batch.num_head_rows:
            raise RuntimeError(f"the head met {len(x_rows)} rows in a step with {extras.batch.num_head_rows}")

        def own(start: int, rows: Tensor) -> Tensor | None:
            held = self.table.get(start)
            return None if held is None else self._own(held, y_rows[rows].float(), x_rows[rows])

        blend(y_rows, extras.batch.kept, own)

    def _own(self, held: AppliedHead, y: Tensor, x: Tensor) -> Tensor:
        """The output of one adapter alone for x [n, hidden], in place of the base's y, float32 [n, columns]."""
        part, pair = held.part, held.pair
        if any(each is not None for each in (part.weight, part.bias, part.rows)):
            self._replace(held, y, x)
        if held.affine is not None:
            size = held.affine.shape[1]
            y[:, :size] = y[:, :size] * (1 + held.affine[0]) + held.affine[1]
        if pair is not None:
            size = pair.lora_b.shape[1]
            y[:, :size] += product(product(x, pair.lora_a).to(x.dtype), pair.lora_b.T)
        return y

    def _replace(self, held: AppliedHead, y: Tensor, x: Tensor) -> None:
        """Put what the adapter has of its own into y [n, columns]."""
        part, bias = held.part, self._bias_of(held, y)
        if part.weight is not None:
            size = len(part.weight)
            y[:, :size] = product(x, part.weight) + bias[:size]
        elif part.bias is not None:
            size = len(part.bias)
            y[:, :size] += (bias - self._base_bias(held, y))[:size]
        if part.rows is not None:
            y[:, part.rows.ids] = product(x, part.rows.values) + bias[part.rows.ids]

    def _bias_of(self, held: AppliedHead, like: Tensor) -> Tensor:
        """The bias an adapter has, 0 where none reaches: float32 [columns]."""
        bias = self._base_bias(held, like)
        if held.part.bias is not None:
            bias[: len(held.part.bias)] = held.part.bias
        return bias

    def _base_bias(self, held: AppliedHead, like: Tensor) -> Tensor:
        bias = like.new_zeros(held.num_columns)
        if self._bias is not None:
            bias[: len(self._bias)] = self._bias
        return bias


class LoRAHead(nn.Module):
    """Mixed in before a head's own class."""

    def forward(self, x: Tensor) -> Tensor:
        site: HeadSite = self.__dict__[STATE]
        y = site.forward(x)
        extras = site.step.extras
        if extras is None or not extras.features & (StepFeature.HEAD | StepFeature.WIDE_LOGITS):
            return y
        y = site.widened(y, extras)
        host_call(partial(site.apply, extras), y, x)
        return y
