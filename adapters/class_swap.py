"""How a module of a loaded model gets another forward: its class is swapped for a subclass of its own.

Names in state_dict, isinstance, tied weights and quantised subclasses stay as they are. Knows no model.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn

STATE = "loramux_lora"
"""The attribute of a swapped module that holds what its forward needs."""


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward of a module not yet swapped: its class's, or one hung on the instance by someone else."""
    forward: Callable[..., Any] = module.__dict__.get("forward") or type(module).forward.__get__(module)
    return forward


def swap(module: nn.Module, mixin: type[nn.Module], state: object) -> None:
    """Let `mixin` stand before the module's class, with `state` at hand; takes place of a forward on the instance."""
    module.__dict__.pop("forward", None)
    module.__dict__[STATE] = state
    module.__class__ = _mixed(mixin, type(module))  # type: ignore[arg-type]  # mypy doubts that classes hash


@cache
def _mixed(mixin: type[nn.Module], stock: type[nn.Module]) -> type[nn.Module]:
    """One subclass for each class of modules."""
    namespace: dict[str, Any] = {
        "__module__": __name__,
        "__doc__": f"{stock.__name__} with what its rows' adapters add.",
    }
    return type(f"LoRA{stock.__name__}", (mixin, stock), namespace)
