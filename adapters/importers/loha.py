"""LoHa: ΔW = s · (w1a · w1b) ⊙ (w2a · w2b), which is a pair of rank r². Knows nothing of the base."""

from collections.abc import Mapping

from adapters.folds import product_of_pairs
from adapters.importers.method_modules import Entries, read_modules, require_shape
from adapters.key_roles import Role
from adapters.proposal import PairProposal, Proposal, joined
from adapters.propose_whole import propose_whole
from adapters.recipe import Recipe
from adapters.safetensors_header import TensorEntry, require_matrix

_ROLES = (Role.W1_A, Role.W1_B, Role.W2_A, Role.W2_B)


def propose_loha(recipe: Recipe, entries: Entries) -> Proposal:
    found = read_modules(entries, _ROLES)
    pairs = tuple(_pair(recipe, module, roles) for module, roles in found.modules.items())
    return joined(Proposal(pairs=pairs, features=("loha",)), propose_whole(recipe, found.keys, entries))


def _pair(recipe: Recipe, module: str, roles: Mapping[Role, TensorEntry]) -> PairProposal:
    w1_a, w1_b, w2_a, w2_b = (roles[role] for role in _ROLES)
    for entry in (w1_a, w1_b, w2_a, w2_b):
        require_matrix(entry)
    r = w1_b.shape[0]
    require_shape(w1_a, (w1_a.shape[0], r))
    require_shape(w2_a, w1_a.shape)
    require_shape(w2_b, w1_b.shape)
    return PairProposal(
        source=module,
        inputs=(w1_a.name, w1_b.name, w2_a.name, w2_b.name),
        scale=recipe.scales.scale_of(module),
        lora_rank=r * r,
        declared_rank=recipe.scales.rank_of(module),
        stored_rank=r,
        in_features=w1_b.shape[1],
        out_features=w1_a.shape[0],
        fold=product_of_pairs,
    )
