"""AdaLoRA: ΔW = B · diag(E) · A · alpha / (init_r + 1e-5), with the ranks that training kept stored and no others.

PEFT divides by the rank that training began with, not by the one that is stored, and by the thousandth more: so it
trained. Knows nothing of the base.
"""

from collections.abc import Mapping

from adapters.folds import scaled_ranks
from adapters.importers.method_modules import Entries, bounded, read_modules, require_shape
from adapters.key_roles import Role
from adapters.proposal import PairProposal, Proposal, joined
from adapters.propose_whole import propose_whole
from adapters.recipe import Recipe
from adapters.refusals import shape_mismatch
from adapters.safetensors_header import TensorEntry, require_matrix

_ROLES = (Role.BARE_A, Role.BARE_B, Role.E)
_TINY = 1e-5


def propose_adalora(recipe: Recipe, entries: Entries) -> Proposal:
    found = read_modules(entries, _ROLES)
    kept = _kept(recipe)
    pairs, dropped = [], []
    for module, roles in found.modules.items():
        _check_rank(module, roles, kept, recipe)
        if roles[Role.E].shape[0] == 0:  # training gave the module no rank at all
            _check_empty(roles)
            dropped += [entry.name for entry in roles.values()]
        else:
            pairs.append(_pair(recipe, module, roles))
    features = ("adalora",)
    own = Proposal(pairs=tuple(pairs), dropped=tuple(dropped), features=features, warnings=_warnings(dropped))
    return joined(own, propose_whole(recipe, found.keys, entries))


def _pair(recipe: Recipe, module: str, roles: Mapping[Role, TensorEntry]) -> PairProposal:
    lora_a, lora_b, lora_e = (roles[role] for role in _ROLES)
    for entry in (lora_a, lora_b, lora_e):
        require_matrix(entry)
    lora_rank = lora_a.shape[0]
    require_shape(lora_b, (lora_b.shape[0], lora_rank))
    require_shape(lora_e, (lora_rank, 1))
    alpha, init_r = recipe.number("alpha"), recipe.number("init_r")
    assert isinstance(alpha, float) and isinstance(init_r, int)
    strength = alpha if alpha > 0 else float(lora_rank)
    return PairProposal(
        source=module,
        inputs=(lora_a.name, lora_b.name, lora_e.name),
        scale=bounded(strength / (init_r + _TINY), f"lora_alpha={alpha:g}"),
        lora_rank=lora_rank,
        in_features=lora_a.shape[1],
        out_features=lora_b.shape[0],
        fold=scaled_ranks,
    )


def _kept(recipe: Recipe) -> dict[str, int]:
    """module → ranks that rank_pattern keeps, whose keys are names of lora_E, with or without the adapter's own."""
    kept = recipe.number("kept")
    assert isinstance(kept, tuple)
    return {pair[0].partition(".lora_E")[0]: pair[1] for pair in kept if isinstance(pair, tuple)}


def _check_rank(module: str, roles: Mapping[Role, TensorEntry], kept: Mapping[str, int], recipe: Recipe) -> None:
    """The tensors must have the rank that the config says: a mask that is not applied yet would be passed over."""
    declared, stored = kept.get(module, recipe.number("init_r")), roles[Role.E].shape[:1]
    if stored != (declared,):
        why = f"the tensor has rank {list(stored)}, the config says {declared}"
        raise shape_mismatch(roles[Role.E].name, why, feature="rank_pattern")


def _check_empty(roles: Mapping[Role, TensorEntry]) -> None:
    """A [0, in], B [out, 0] and E [0, 1]: what is dropped must hold nothing."""
    lora_a, lora_b, lora_e = (roles[role] for role in _ROLES)
    require_shape(lora_a, (0, max(lora_a.shape, default=0)))
    require_shape(lora_b, (max(lora_b.shape, default=0), 0))
    require_shape(lora_e, (0, 1))


def _warnings(dropped: list[str]) -> tuple[str, ...]:
    num_modules = len(dropped) // len(_ROLES)
    return (f"{num_modules} modules were left without any rank by AdaLoRA: not adapted",) if dropped else ()
