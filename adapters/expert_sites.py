"""Where a model's experts and routers learn which tokens of the step have adapters that change them.

An expert's two products are not linear in each other, so a token of several adapters is computed with all of them at
once (lora_experts.py). A router's pair is added to its logits before it chooses: transformers' own code runs, reading
`F.linear` from here; its class is swapped. Knows which pool row an adapter begins at, and nothing of requests.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.adapter_extras import ExpertPairs
from adapters.class_swap import STATE
from adapters.host_call import host_call
from adapters.hosted_rows import blend
from adapters.lora_model import LoRAWeights
from adapters.lora_step import Step
from adapters.ops import product
from adapters.staged_extras import StagedExtras
from adapters.step_features import StepFeature


@dataclass(frozen=True, slots=True, eq=False)
class ExpertsPart:
    """What an adapter with one weight adds for some tokens."""

    weight: float
    pairs: ExpertPairs
    tokens: Tensor  # int64, no two alike


class ExpertsSite:
    def __init__(self, step: Step) -> None:
        self.step = step
        self.table: dict[int, ExpertPairs] = {}  # by first pool row

    @property
    def extras(self) -> StagedExtras | None:
        """Of the step under way, when they have to do with experts."""
        extras = self.step.extras
        return extras if extras is not None and extras.features & StepFeature.EXPERTS and self.table else None

    def parts(self, extras: StagedExtras, x: Tensor) -> list[ExpertsPart]:
        """Of the tokens x [num_tokens, hidden]."""
        if len(x) != extras.num_tokens:
            raise RuntimeError(f"experts met {len(x)} tokens in a step of {extras.num_tokens}")
        return [
            ExpertsPart(part.weight, self.table[part.start], torch.from_numpy(part.rows).to(x.device))
            for part in extras.batch.tokens
            if part.start in self.table
        ]


class RouterSite:
    """`forward` is the router's own; ValueError when its code does not call F.linear."""

    def __init__(self, step: Step, module: nn.Module, forward: Callable[..., Any]) -> None:
        self.step = step
        self.forward = forward
        self.table: dict[int, LoRAWeights] = {}  # by first pool row
        self.is_tiled = module.get_parameter("weight").device.type == "cpu"
        self.adapted = self._with_our_linear(module, forward)

    def _with_our_linear(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The router's very code, reading `F` elsewhere."""
        own = getattr(forward, "__func__", None)
        if not isinstance(own, FunctionType) or not calls_linear(module):
            raise ValueError(f"{type(module).__name__} does not compute its logits with F.linear")
        names = {**own.__globals__, "F": _Functional(self._linear)}
        again = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
        again.__kwdefaults__ = own.__kwdefaults__
        return partial(again, module)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, hidden] → logits [T, E], with the step's deltas; on the CPU to the same bits whatever T is."""
        extras = self.extras
        if self.is_tiled:
            y = x.new_empty(*x.shape[:-1], len(weight))
            host_call(_multiply_alone, y, x, weight, *([] if bias is None else [bias]))
        else:
            y = functional.linear(x, weight, bias)
        if extras is not None:
            host_call(partial(self._apply, extras), y, x)
        return y

    @property
    def extras(self) -> StagedExtras | None:
        """Of the step under way, when they have to do with routers."""
        extras = self.step.extras
        return extras if extras is not None and extras.features & StepFeature.EXPERTS and self.table else None

    def _apply(self, extras: StagedExtras, y: Tensor, x: Tensor) -> None:
        if len(x) != extras.num_tokens:
            raise RuntimeError(f"a router met {len(x)} tokens in a step of {extras.num_tokens}")

        def own(start: int, rows: Tensor) -> Tensor | None:
            pair = self.table.get(start)
            if pair is None:
                return None
            return y[rows].float() + product(product(x[rows], pair.lora_a).to(x.dtype), pair.lora_b.T)

        blend(y, extras.batch.tokens, own)


class LoRARouter(nn.Module):
    """Mixed in before a router's own class."""

    def forward(self, x: Tensor) -> Any:
        site: RouterSite = self.__dict__[STATE]
        return site.adapted(x) if site.is_tiled or site.extras is not None else site.forward(x)


def _multiply_alone(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """y [..., out] = x [..., in] · weight [out, in]ᵀ + bias, each row by itself."""
    found = product(x.reshape(-1, x.shape[-1]), weight)
    y.copy_((found if bias is None else found + bias).view_as(y))


def calls_linear(module: nn.Module) -> bool:
    """Whether its forward is a function that calls F.linear."""
    own = type(module).forward
    if not isinstance(own, FunctionType) or own.__globals__.get("F") is not functional:
        return False
    return {"F", "linear"} <= set(own.__code__.co_names)


class _Functional:
    """torch.nn.functional with another `linear`."""

    def __init__(self, linear: Callable[..., Tensor]) -> None:
        self.linear = linear

    def __getattr__(self, name: str) -> Any:
        return getattr(functional, name)
