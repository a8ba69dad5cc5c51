"""VeRA: ΔW = diag(λ_b) · B · diag(λ_d) · A with A and B shared by all modules, each of which takes their corner.

A pair of its own for every module: what VeRA saves on disk is spent in memory. Knows nothing of the base.
"""

from functools import partial

from adapters.folds import corner_fits, shared_projections
from adapters.importers.method_modules import Entries, read_modules
from adapters.key_roles import Role
from adapters.proposal import PairProposal, Proposal, joined
from adapters.propose_whole import propose_whole
from adapters.recipe import Recipe
from adapters.refusals import VERA_NOT_STORED, shape_mismatch
from adapters.safetensors_header import TensorEntry, require_matrix

_OWN = (Role.LAMBDA_D, Role.LAMBDA_B)
_SHARED = (Role.VERA_A, Role.VERA_B)


def propose_vera(recipe: Recipe, entries: Entries) -> Proposal:
    found = read_modules(entries, _OWN, also=_SHARED)
    shared = {key.role: entries[key.key] for key in found.keys if key.role in _SHARED}
    if len(shared) < len(_SHARED):
        raise VERA_NOT_STORED.error()
    vera_a, vera_b = shared[Role.VERA_A], shared[Role.VERA_B]
    for entry in (vera_a, vera_b):
        require_matrix(entry)
    if vera_b.shape[1] != vera_a.shape[0]:
        raise shape_mismatch(vera_b.name, f"B is {list(vera_b.shape)} beside an A of {list(vera_a.shape)}")
    pairs = tuple(
        _pair(recipe, module, roles[Role.LAMBDA_D], roles[Role.LAMBDA_B], vera_a, vera_b)
        for module, roles in found.modules.items()
    )
    return joined(Proposal(pairs=pairs, features=("vera",)), propose_whole(recipe, found.keys, entries))


def _pair(
    recipe: Recipe,
    module: str,
    lambda_d: TensorEntry,
    lambda_b: TensorEntry,
    vera_a: TensorEntry,
    vera_b: TensorEntry,
) -> PairProposal:
    lora_rank = vera_a.shape[0]
    if lambda_d.shape != (lora_rank,):
        raise shape_mismatch(lambda_d.name, f"the tensor is {list(lambda_d.shape)}; vera_A needs {[lora_rank]}")
    if len(lambda_b.shape) != 1 or not 0 < lambda_b.shape[0] <= vera_b.shape[0]:
        why = f"the tensor is {list(lambda_b.shape)}; vera_B has {vera_b.shape[0]} rows"
        raise shape_mismatch(lambda_b.name, why)
    return PairProposal(
        source=module,
        inputs=(lambda_d.name, lambda_b.name, vera_a.name, vera_b.name),
        scale=1.0,
        lora_rank=lora_rank,
        declared_rank=recipe.scales.r,
        fits=partial(corner_fits, width=vera_a.shape[1]),
        out_features=lambda_b.shape[0],
        fold=shared_projections,
    )
