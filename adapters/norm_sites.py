"""Finds the norms of a model whose output is affine in their own parameters: y = x̂ ⊙ (offset + weight) + bias.

Found by trial, with parameters drawn at random, so that no architecture is known by name; what fits no such form is not
a site. Runs on parameters of its own, so the model may be on any device, the meta device too.
"""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.func import functional_call

from adapters.base_parts import NormShape

_TOKENS = 3
_MAX_ELEMENTS = 1 << 20  # of a norm's weight; what is larger is a matrix
_TOLERANCE = 1e-4


def norms_of(model: nn.Module) -> Mapping[str, NormShape]:
    """Every norm of `model` whose weight, or bias, an adapter may replace, by full module name."""
    shapes = {name: _shape_of(module) for name, module in model.named_modules()}
    return MappingProxyType({name: shape for name, shape in shapes.items() if shape is not None})


def _shape_of(module: nn.Module) -> NormShape | None:
    own = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    weight = own.get("weight")
    if weight is None or own.keys() - {"weight", "bias"} or any(True for _ in module.children()):
        return None
    if any(True for _ in module.buffers()) or isinstance(module, nn.Linear | nn.Embedding):
        return None
    has_bias = "bias" in own
    if weight.ndim not in (1, 2) or weight.numel() > _MAX_ELEMENTS:
        return None
    if has_bias and own["bias"].shape != weight.shape:
        return None
    try:
        offset = _offset_of(module, tuple(weight.shape), has_bias=has_bias)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):  # it is no module of one input
        return None
    return None if offset is None else NormShape(tuple(weight.shape), offset, has_bias)


def _offset_of(module: nn.Module, shape: tuple[int, ...], *, has_bias: bool) -> float | None:
    """What is added to the weight; None when the output is not affine in the parameters, element by element."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, _TOKENS, *shape, generator=generator) + 0.5

    def run(weight: Tensor, bias: Tensor) -> Tensor:
        y = functional_call(module, {"weight": weight, **({"bias": bias} if has_bias else {})}, (x,))
        if not isinstance(y, Tensor) or y.shape != x.shape:
            raise TypeError("it gives no output of its input's shape")
        return y.float()

    with torch.inference_mode():
        zeros, ones = torch.zeros(shape), torch.ones(shape)
        at_zero = run(zeros, zeros)
        normed = run(ones, zeros) - at_zero  # x̂
        size = (normed * normed).sum()
        if not size > 0:
            return None
        offset = round(float((at_zero * normed).sum() / size), 3)
        for _ in range(2):
            weight = torch.randn(shape, generator=generator)
            bias = torch.randn(shape, generator=generator) if has_bias else zeros
            if not torch.allclose(run(weight, bias), normed * (offset + weight) + bias, _TOLERANCE, _TOLERANCE):
                return None
    return offset
