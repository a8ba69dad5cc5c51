"""The readers of all methods, by the name that a Recipe calls them."""

from collections.abc import Callable, Mapping

from adapters.proposal import Proposal
from adapters.propose_lora import propose_lora
from adapters.recipe import Recipe
from adapters.safetensors_header import TensorEntry

Propose = Callable[[Recipe, Mapping[str, TensorEntry]], Proposal]

PROPOSE: Mapping[str, Propose] = {
    "lora": propose_lora,
}
