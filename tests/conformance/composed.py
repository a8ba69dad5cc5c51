"""k adapters at once, by definition and independent of any implementation: y = base(x) + Σ w_k (peft_k(x) − base(x)).

Every module that PEFT wrapped in any of the adapters' models is computed by each of them on the very x that the sum
has there, and the differences are added up. Holds for what leaves the lookup and the linears alone to adapters that
are sums of such modules: LoRA with scales, DoRA, biases of targeted modules. Adapters that replace modules conflict.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from tests.conformance.models import fresh
from tests.conformance.oracle import PeftOracle, forward


@dataclass(frozen=True)
class SumOracle:
    architecture: str
    parts: tuple[tuple[PeftOracle, float], ...]

    def logits(self, ids: Sequence[int], num_prompt_tokens: int) -> Tensor:
        del num_prompt_tokens
        return forward(self._model, ids)

    @cached_property
    def _model(self) -> nn.Module:
        model = fresh(self.architecture)
        for name, layers in self._wrapped().items():
            model.get_submodule(name).register_forward_hook(_adding(layers))
        return model

    def _wrapped(self) -> dict[str, list[tuple[Any, float]]]:
        """module of the base → the layers that stand in its place in PEFT's models, with their weights."""
        found: dict[str, list[tuple[Any, float]]] = {}
        for part, weight in self.parts:
            inner = part.model.get_base_model()
            for name, module in inner.named_modules():
                if isinstance(module, BaseTunerLayer):
                    found.setdefault(name, []).append((module, weight))
        assert found, "PEFT wrapped nothing"
        return found


def _adding(layers: Sequence[tuple[Any, float]]) -> Any:
    def add(_module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        with torch.inference_mode():
            return y + sum(weight * (layer(*args) - y) for layer, weight in layers)

    return add
