"""Rotary embedding of stock attention modules: q and k turned by one kernel call in place of some sixteen operations.

transformers offers no hook for it without its `kernels` package: attention modules call a function of their own file,
`apply_rotary_pos_emb`. A swapped module gets a subclass of its class whose forward is the stock forward's very code,
reading that one name elsewhere; class, function and file of transformers stay as they are, and so does every other
model. Only after a trial in which the kernel gave the bits of the model's own function. Knows nothing of KV caches.
"""

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adapters.ops.thread_team import KernelArguments, current_team
from server.engine import fused_kernels as kernels

_NAME = "apply_rotary_pos_emb"

Rotate = Callable[..., tuple[Tensor, Tensor]]


class FusedRotary(nn.Module):
    """Marks attention modules whose q and k are turned by the kernel."""


def fuse_rotary(model: nn.Module) -> int:
    """Swap every attention module of a model on the CPU whose rotary function the kernel equals; returns how many."""
    num_fused = 0
    for module in model.modules():
        weight = next(module.parameters(recurse=True), None)
        if isinstance(module, FusedRotary) or weight is None or weight.device.type != "cpu":
            continue
        stock: Any = type(module)  # to mypy a class of modules is not hashable
        fused = _fused_class(stock, weight.dtype)
        if fused is not None:
            module.__class__ = fused
            num_fused += 1
    return num_fused


@cache
def _fused_class(stock: type[Any], dtype: torch.dtype) -> type[nn.Module] | None:
    """`stock` with its forward reading our function; None where its forward reads none that the kernel equals."""
    forward = stock.forward
    if not isinstance(forward, FunctionType) or _NAME not in forward.__code__.co_names or dtype not in kernels.ROTARY:
        return None
    own = forward.__globals__.get(_NAME)
    fused = _rotate_by_kernel(own, dtype) if own is not None else None
    if own is None or fused is None or not _agrees(own, fused, dtype):
        return None
    names = {**forward.__globals__, _NAME: fused}
    again = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    again.__kwdefaults__ = forward.__kwdefaults__
    return type(f"Fused{stock.__name__}", (FusedRotary, stock), {"forward": again, "__doc__": stock.__doc__})


def _rotate_by_kernel(own: Rotate, dtype: torch.dtype) -> Rotate:
    """A function in the place of `own`, which goes on to serve what the kernel does not."""
    kernel = kernels.ROTARY[dtype].address

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """q [1, num_heads, num_tokens, head_dim] · cos + rotate_half(q) · sin, k likewise; cos [1, num_tokens, dim]."""
        if rest or named or not _is_served(q, k, cos, sin, dtype):
            return own(q, k, cos, sin, *rest, **named)
        _, num_heads, num_tokens, head_dim = q.shape
        num_kv_heads = k.shape[1]
        q_out, k_out = _dense(num_heads, num_tokens, head_dim, dtype), _dense(num_kv_heads, num_tokens, head_dim, dtype)
        _, q_head_stride, q_token_stride, _ = q.stride()
        _, k_head_stride, k_token_stride, _ = k.stride()
        per_chunk = max(1, kernels.CHUNK // (num_heads * head_dim))
        tensors = (q_out, k_out, q, k, cos, sin)
        fields = (
            *(tensor.data_ptr() for tensor in tensors),
            q_head_stride, q_token_stride, k_head_stride, k_token_stride,
            num_tokens, num_heads, num_kv_heads, head_dim, per_chunk,
        )  # fmt: skip
        current_team().run(kernel, KernelArguments(np.array(fields, np.int64)), -(-num_tokens // per_chunk))
        return q_out, k_out

    return rotate


def _is_served(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> bool:
    """One packed row, all of one dtype, the whole head turned, elements of a head side by side."""
    batch, _, num_tokens, head_dim = q.shape
    turned = (1, num_tokens, head_dim)
    return (
        q.dtype is dtype
        and k.dtype is dtype
        and cos.dtype is dtype
        and sin.dtype is dtype
        and batch == 1
        and cos.shape == turned
        and sin.shape == turned
        and k.shape[2:] == turned[1:]
        and cos.is_contiguous()
        and sin.is_contiguous()
        and q.stride(3) == 1
        and k.stride(3) == 1
        and not q.requires_grad
    )


def _dense(num_heads: int, num_tokens: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """An empty [1, num_heads, num_tokens, head_dim] that lies in memory as attention reads it, tokens first."""
    width = num_heads * head_dim
    return torch.empty_strided(
        (1, num_heads, num_tokens, head_dim), (num_tokens * width, head_dim, width, 1), dtype=dtype
    )


def _agrees(own: Rotate, fused: Rotate, dtype: torch.dtype) -> bool:
    """Whether both give the same bits, tried on heads as attention cuts them from a linear's output."""
    generator = torch.Generator().manual_seed(0)
    num_tokens, head_dim = 5, 32
    q, k = (
        torch.randn(1, num_tokens, num_heads, head_dim, generator=generator).to(dtype).transpose(1, 2)
        for num_heads in (4, 2)
    )
    # Halves that differ, unlike a real cosine's, so that it matters which element meets which.
    cos, sin = (torch.randn(1, num_tokens, head_dim, generator=generator).to(dtype) for _ in range(2))
    with torch.inference_mode():
        try:
            expected = own(q, k, cos, sin)
            found = fused(q, k, cos, sin)
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):  # another form of the function
            return False
    return len(expected) == 2 and all(map(torch.equal, found, expected))
