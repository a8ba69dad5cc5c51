"""How stock transformers experts reach ours: one registered function, and what each module computes bound to it.

On the CPU every token's experts are computed here, to bits that do not depend on who else was routed where. Elsewhere
the model's own choice of transformers' implementations computes them, and only tokens whose adapters change experts
come here. A module is bound after a trial against its own code; what differs keeps that code, and adapters of its
experts are refused. Knows nothing of requests, and of adapters what adapters/lora_experts.py does.
"""

import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

from adapters.lora_experts import FusedExperts, PlainProduct, bind_experts, bound_experts
from server.engine.expert_trial import agree

logger = logging.getLogger(__name__)

EXPERTS_NAME = "loramux"


def experts(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers calls in place of a module's own loop, which a module that is not bound runs."""
    compute = bound_experts(module) or own_loop(module)
    return compute(hidden_states, top_k_index, top_k_weights)


ExpertsInterface.register(EXPERTS_NAME, experts)


def bind(model: PreTrainedModel, names: Iterable[str]) -> frozenset[str]:
    """Let the experts `names` of a loaded model be computed here; returns those whose own code gives the same."""
    bound = set()
    for name in names:
        module = model.get_submodule(name)
        stock, is_ours = _stock(module), next(module.parameters()).device.type == "cpu"
        products = PlainProduct(module, "gate_up_proj"), PlainProduct(module, "down_proj")
        fused = FusedExperts(module, *products, None if is_ours else stock)
        if agree(module, stock, fused.run):
            bind_experts(module, fused)
            bound.add(name)
        else:
            logger.warning("%s compute otherwise than known experts: they stay as they are, without adapters", name)
    if bound:
        model.set_experts_implementation(EXPERTS_NAME)
    return frozenset(bound)


def own_loop(module: nn.Module) -> Callable[..., Tensor]:
    """The forward that the module's class has in its source, which transformers hides behind its choice."""
    own: Callable[..., Tensor] = getattr(type(module).forward, "__wrapped__", type(module).forward)
    return partial(own, module)


def _stock(module: nn.Module) -> Callable[..., Tensor]:
    """What transformers has chosen for the module."""
    config: Any = module.config
    chosen = ALL_EXPERTS_FUNCTIONS.get(config._experts_implementation)
    return own_loop(module) if chosen is None else partial(chosen, module)
