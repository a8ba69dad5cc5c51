"""Fused experts and routers of a model, swapped by class, for the tokens of adapters that change them.

An expert's two products are not linear in each other, so a token of several adapters is computed once, with all of
them. A router's pair is added to its logits before it chooses: transformers' own code runs, reading `F.linear` from
here. Knows which pool row an adapter begins at, and nothing of requests.
"""

from collections import defaultdict
from collections.abc import Callable
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
from adapters.lora_experts import experts_with_pairs
from adapters.lora_model import LoRAWeights
from adapters.lora_step import Step
from adapters.ops import product
from adapters.staged_extras import StagedExtras
from adapters.step_features import StepFeature

Mix = tuple[tuple[int, float], ...]
"""Adapters by first pool row, each with its weight, as one token has them."""


class ExpertsSite:
    def __init__(self, step: Step, module: nn.Module, forward: Callable[..., Tensor]) -> None:
        self.step = step
        self.forward = forward  # without adapters
        self.table: dict[int, ExpertPairs] = {}  # by first pool row
        self._module = module

    def apply(self, extras: StagedExtras, y: Tensor, x: Tensor, index: Tensor, weights: Tensor) -> None:
        """y [T, hidden] is the base's output for x [T, hidden], `index` and `weights` [T, k] the router's choice."""
        if len(x) != extras.num_tokens:
            raise RuntimeError(f"experts met {len(x)} tokens in a step of {extras.num_tokens}")
        for mix, tokens in self._tokens_by_mix(extras).items():
            rows = torch.tensor(tokens, device=x.device)
            parts = [(weight, self.table[start]) for start, weight in mix]
            y[rows] = experts_with_pairs(self._module, x[rows], index[rows], weights[rows], parts).to(y.dtype)

    def _tokens_by_mix(self, extras: StagedExtras) -> dict[Mix, list[int]]:
        mixes: defaultdict[int, list[tuple[int, float]]] = defaultdict(list)
        for part in extras.batch.tokens:
            if part.start in self.table:
                for token in part.rows.tolist():
                    mixes[token].append((part.start, part.weight))
        tokens: defaultdict[Mix, list[int]] = defaultdict(list)
        for token, mix in sorted(mixes.items()):
            tokens[tuple(mix)].append(token)
        return tokens


class LoRAExperts(nn.Module):
    """Mixed in before the class of fused experts."""

    def forward(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        site: ExpertsSite = self.__dict__[STATE]
        y = site.forward(x, top_k_index, top_k_weights)
        extras = site.step.extras
        if extras is not None and extras.features & StepFeature.EXPERTS and site.table:
            host_call(partial(site.apply, extras), y, x, top_k_index, top_k_weights)
        return y


class RouterSite:
    """`forward` is the router's own; ValueError when its code does not call F.linear."""

    def __init__(self, step: Step, module: nn.Module, forward: Callable[..., Any]) -> None:
        self.step = step
        self.forward = forward
        self.table: dict[int, LoRAWeights] = {}  # by first pool row
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
        """x [T, hidden] → logits [T, E], with the step's deltas."""
        y = functional.linear(x, weight, bias)
        extras = self.step.extras
        assert extras is not None
        host_call(partial(self._apply, extras), y, x)
        return y

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
        extras = site.step.extras
        is_needed = extras is not None and extras.features & StepFeature.EXPERTS and site.table
        return site.adapted(x) if is_needed else site.forward(x)


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
