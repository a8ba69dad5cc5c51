"""RMSNorms of stock models, each computed by one kernel call in place of some eight torch operations.

A module is swapped by its class, to a subclass of its own, after its own forward and the kernel agreed on its weight
in one of the forms that models use; what agrees with none is left alone. For models that are loaded, frozen and stay
on the CPU. Knows nothing of attention, and of models only what a norm's attributes tell.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from adapters.ops.chunk_kernel import Kernel
from adapters.ops.thread_team import KernelArguments, current_team
from server.engine import fused_kernels as kernels

_TRIAL_ROWS = 32
# Of an element. Sums in another order move x̂ by a step of bf16 now and then, which the weight can make two.
_MAX_DIFFERENCE = {torch.bfloat16: 2.0**-6, torch.float32: 1e-6}
_MIN_EQUAL = {torch.bfloat16: 0.98, torch.float32: 0.0}  # share of elements; only bf16 tells roundings apart


class NormForm(NamedTuple):
    """y = (offset + weight) · x̂ with x̂ = x / √(mean(x²) + eps), for rows [dim] of one dtype."""

    kernel: Kernel
    dtype: torch.dtype
    dim: int
    eps: float
    offset: float  # Gemma stores weight - 1
    rounds_first: bool  # x̂ is rounded to dtype before the product
    arguments: KernelArguments

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """y of x [..., dim], contiguous."""
        out = torch.empty_like(x)
        num_rows = x.numel() // self.dim
        per_chunk = max(1, kernels.CHUNK // self.dim)
        self.arguments.fields[: kernels.NORM_ROUNDS_FIRST] = (
            out.data_ptr(), x.data_ptr(), weight.data_ptr(), num_rows, self.dim, per_chunk,
        )  # fmt: skip
        current_team().run(self.kernel, self.arguments, -(-num_rows // per_chunk))
        return out


class FusedRMSNorm(nn.Module):
    """Stands before the stock class in the swapped class, whose forward serves what the kernel cannot."""

    _form: NormForm

    def forward(self, x: Tensor) -> Tensor:
        form = self._form
        if x.dtype is not form.dtype or x.shape[-1] != form.dim or x.requires_grad:
            stock: Tensor = super().forward(x)
            return stock
        return form.apply(x if x.is_contiguous() else x.contiguous(), self._parameters["weight"])  # type: ignore[arg-type]


def fuse_norms(model: nn.Module) -> int:
    """Swap every RMSNorm of a frozen model on the CPU that the kernel agrees with; returns how many."""
    num_fused = 0
    for module in model.modules():
        form = next((form for form in _forms(module) if _agrees(module, form)), None)
        if form is not None:
            module._form = form  # type: ignore[assignment]
            stock: Any = type(module)  # to mypy a class of modules is not hashable
            module.__class__ = _fused_class(stock)
            num_fused += 1
    return num_fused


@cache
def _fused_class(stock: type[Any]) -> type[nn.Module]:
    return type(f"Fused{stock.__name__}", (FusedRMSNorm, stock), {})


def _forms(module: nn.Module) -> list[NormForm]:
    """The forms to try: none unless the module has the looks of an RMSNorm, one weight [dim] and an epsilon."""
    weight = module._parameters.get("weight")
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    others = [*module.children(), *module.buffers(), *(p for p in module.parameters() if p is not weight)]
    if weight is None or weight.ndim != 1 or not isinstance(eps, float) or others or isinstance(module, FusedRMSNorm):
        return []
    is_known = weight.device.type == "cpu" and weight.dtype in kernels.RMS_NORM
    if not is_known or weight.requires_grad or not weight.is_contiguous():
        return []
    known = (kernels.RMS_NORM[weight.dtype].address, weight.dtype, weight.numel(), eps)
    forms = ((0.0, True), (1.0, False), (0.0, False))
    return [NormForm(*known, *form, _arguments(eps, *form)) for form in forms]


def _arguments(eps: float, offset: float, rounds_first: bool) -> KernelArguments:
    fields = np.zeros(kernels.NORM_FIELDS, np.int64)
    fields[kernels.NORM_ROUNDS_FIRST] = rounds_first
    fields.view(np.float32)[2 * kernels.NORM_NUMBERS :][:2] = eps, offset
    return KernelArguments(fields)


def _agrees(module: nn.Module, form: NormForm) -> bool:
    """Whether the kernel gives what the module's own forward gives, for rows of all sizes, off-centre, and zeros."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_TRIAL_ROWS, form.dim, generator=generator) + 0.5
    x *= torch.logspace(-5, 3, _TRIAL_ROWS)[:, None]
    x[0] = 0
    x = x.to(form.dtype)
    with torch.inference_mode():
        try:
            stock = module.forward(x)
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):  # it is no norm of one input
            return False
        found = form.apply(x, module._parameters["weight"])  # type: ignore[arg-type]
    return isinstance(stock, Tensor) and _close(found, stock, form.dtype)


def _close(found: Tensor, stock: Tensor, dtype: torch.dtype) -> bool:
    if stock.dtype is not dtype or stock.shape != found.shape:
        return False
    difference, size = (found.float() - stock.float()).abs(), stock.float().abs()
    is_near = bool((difference <= _MAX_DIFFERENCE[dtype] * size).all())
    return is_near and float((difference == 0).float().mean()) >= _MIN_EQUAL[dtype]
