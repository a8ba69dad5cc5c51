"""The readers of all methods, by the name that a Recipe calls them."""

from collections.abc import Callable, Mapping

from adapters.importers.adalora import propose_adalora
from adapters.importers.delora import propose_delora
from adapters.importers.ia3 import propose_ia3
from adapters.importers.ln_tuning import propose_ln_tuning
from adapters.importers.loha import propose_loha
from adapters.importers.miss import propose_miss
from adapters.importers.mlx import propose_mlx
from adapters.importers.vera import propose_vera
from adapters.proposal import Proposal
from adapters.propose_lora import propose_lora
from adapters.recipe import Recipe
from adapters.safetensors_header import TensorEntry

Propose = Callable[[Recipe, Mapping[str, TensorEntry]], Proposal]

PROPOSE: Mapping[str, Propose] = {
    "lora": propose_lora,
    "mlx": propose_mlx,
    "adalora": propose_adalora,
    "vera": propose_vera,
    "loha": propose_loha,
    "delora": propose_delora,
    "miss": propose_miss,
    "ia3": propose_ia3,
    "ln_tuning": propose_ln_tuning,
}
