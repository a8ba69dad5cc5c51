"""DeLoRA: ΔW = B · diag(λ / (r ‖A_i‖ ‖B_i‖)) · A · diag(‖W_j‖), ‖W_j‖ being stored. Knows nothing of the base."""

from collections.abc import Mapping

from adapters.folds import normalised_ranks
from adapters.importers.method_modules import Entries, read_modules, require_shape
from adapters.key_roles import Role
from adapters.proposal import PairProposal, Proposal, joined
from adapters.propose_whole import propose_whole
from adapters.recipe import Recipe
from adapters.safetensors_header import TensorEntry, require_matrix

_ROLES = (Role.DELORA_A, Role.DELORA_B, Role.DELORA_LAMBDA, Role.DELORA_W_NORM)


def propose_delora(recipe: Recipe, entries: Entries) -> Proposal:
    found = read_modules(entries, _ROLES)
    pairs = tuple(_pair(recipe, module, roles) for module, roles in found.modules.items())
    return joined(Proposal(pairs=pairs, features=("delora",)), propose_whole(recipe, found.keys, entries))


def _pair(recipe: Recipe, module: str, roles: Mapping[Role, TensorEntry]) -> PairProposal:
    """Its r is both the rank and a divisor, so the config and the tensors must agree (declared_rank)."""
    delora_a, delora_b, delora_lambda, w_norm = (roles[role] for role in _ROLES)
    require_matrix(delora_a)
    require_matrix(delora_b)
    lora_rank, in_features = delora_a.shape
    require_shape(delora_b, (delora_b.shape[0], lora_rank))
    require_shape(delora_lambda, (1,))
    require_shape(w_norm, (in_features,))
    return PairProposal(
        source=module,
        inputs=(delora_a.name, delora_b.name, delora_lambda.name, w_norm.name),
        scale=1.0,
        lora_rank=lora_rank,
        declared_rank=recipe.scales.rank_of(module),
        in_features=in_features,
        out_features=delora_b.shape[0],
        fold=normalised_ranks,
    )
