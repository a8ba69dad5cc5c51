"""Linears computed by our own product of bfloat16 rows with a packed weight (product_kernels.py).

Linears that read one input become one product. Knows which modules it can serve and how their weight is packed;
nothing of LoRA.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.host_memory import HostMemory
from adapters.ops.bf16_tile import WIDTH, panels_at_once
from adapters.ops.thread_team import KernelArguments, ThreadTeam
from adapters.shared_result import SharedResult
from server.engine import product_kernels as kernels

_TOLERANCE = 2e-2  # of the largest output, bfloat16
_TRIAL_ROWS = (14, 5, 2)


class PanelLinear(nn.Linear):
    """A linear whose weight lies in panels: y = x · Wᵀ + b. Reading the weight by itself fails loudly."""

    product: SharedResult
    _index: int

    def forward(self, x: Tensor) -> Tensor:
        return self.product.take(self._index, x)


class _Product:
    """y_m = x · W_mᵀ + b_m for the linears m that read one input, as one call of a kernel."""

    def __init__(self, linears: Sequence[nn.Linear], team: ThreadTeam, memory: HostMemory) -> None:
        self._run, self._kernel = team.run, kernels.product.address
        self._in_features = linears[0].in_features
        self._out_features = [linear.out_features for linear in linears]
        self.weights = [_pack(linear.weight, memory) for linear in linears]  # [out / WIDTH, in / 2, WIDTH, 2] bfloat16
        self._biases = [_bias(linear) for linear in linears]  # float32 [out_features]
        self._arguments = KernelArguments(np.zeros(kernels.MODULES + len(linears) * kernels.MODULE, np.int64))
        self._fields = self._arguments.fields
        self._fields[kernels.NUM_PAIRS] = self._in_features // 2
        self._fields[kernels.NUM_THREADS] = team.num_threads
        for number, linear in enumerate(linears):
            fields = self._fields[kernels.MODULES + number * kernels.MODULE :]
            fields[kernels.WEIGHT] = self.weights[number].data_ptr()
            fields[kernels.BIAS] = self._biases[number].data_ptr()
            fields[kernels.OUT_FEATURES] = linear.out_features
        self._step_fields = slice(kernels.X, kernels.PANELS + 1)
        self._y_fields = slice(kernels.MODULES + kernels.Y, None, kernels.MODULE)

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """One output [..., out_features] for each linear, for x [..., in_features] of bfloat16."""
        if x.dtype is not torch.bfloat16 or x.shape[-1] != self._in_features:
            raise RuntimeError(f"x is {x.dtype} {tuple(x.shape)}, not bfloat16 of {self._in_features} features")
        leading = x.shape[:-1]
        num_tokens = x.numel() // self._in_features
        panels = panels_at_once(num_tokens)
        rows = x if x.is_contiguous() else x.reshape(num_tokens, self._in_features).contiguous()
        ys = [torch.empty((*leading, out), dtype=torch.bfloat16) for out in self._out_features]
        self._fields[self._step_fields] = (rows.data_ptr(), self._in_features, num_tokens, panels)
        self._fields[self._y_fields] = [y.data_ptr() for y in ys]
        self._run(self._kernel, self._arguments, self._num_chunks(panels))
        return ys

    def _num_chunks(self, panels: int) -> int:
        """Chunks of so many panels, the last of a linear's having fewer."""
        return sum(-(-out // (WIDTH * panels)) for out in self._out_features)


def fits(linear: nn.Linear) -> bool:
    """Whether a linear has the type and the shape the kernel serves."""
    weight = linear.weight
    shape_fits = linear.in_features % 2 == 0 and linear.out_features % WIDTH == 0
    return shape_fits and weight.dtype is torch.bfloat16 and weight.device.type == "cpu"


def pack_group(
    linears: Sequence[nn.Linear], team: ThreadTeam, memory: HostMemory, *, keep_weights: Sequence[bool]
) -> bool:
    """Let these linears, which read one input, be computed as one product; False, and nothing changed, when the
    product does not agree with their own."""
    product = _Product(linears, team, memory)
    if not _agrees(linears, product):
        return False
    shared = SharedResult(product)
    for index, (linear, weight, keep) in enumerate(zip(linears, product.weights, keep_weights, strict=True)):
        linear.__dict__["product"], linear.__dict__["_index"] = shared, index
        if not keep:
            linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.__class__ = PanelLinear
    return True


def _pack(weight: Tensor, memory: HostMemory) -> Tensor:
    """[out, in] → [out / 32, in / 2, 32, 2]: for each pair of inputs, the pairs of a panel's weights side by side."""
    out_features, in_features = weight.shape
    panels = weight.detach().view(out_features // WIDTH, WIDTH, in_features // 2, 2)
    return memory.keep(panels.permute(0, 2, 1, 3))


def _bias(linear: nn.Linear) -> Tensor:
    bias = linear._parameters["bias"]
    return torch.zeros(linear.out_features) if bias is None else bias.detach().float().contiguous()


def _agrees(linears: Sequence[nn.Linear], product: _Product) -> bool:
    """Whether the product gives the plain one, for more rows than the kernel takes at once and for few."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_TRIAL_ROWS[0], linears[0].in_features, generator=generator).bfloat16()
    with torch.inference_mode():
        plain = [functional.linear(x, linear.weight, linear.bias) for linear in linears]
        return all(
            float((y - expected[:rows]).abs().max()) <= _TOLERANCE * float(expected.abs().max())
            for rows in _TRIAL_ROWS
            for expected, y in zip(plain, product(x[:rows]), strict=True)
        )
