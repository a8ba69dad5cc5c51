"""MiSS: rank j reads the sum of every r-th input from j on; the one stored block is B. Knows nothing of the base."""

from functools import partial

from adapters.folds import repeats_fit, shared_inputs
from adapters.importers.method_modules import Entries, read_modules
from adapters.key_roles import Role
from adapters.proposal import PairProposal, Proposal, joined
from adapters.propose_whole import propose_whole
from adapters.recipe import Recipe
from adapters.refusals import shape_mismatch
from adapters.safetensors_header import TensorEntry, require_matrix


def propose_miss(recipe: Recipe, entries: Entries) -> Proposal:
    found = read_modules(entries, (Role.MISS,))
    pairs = tuple(_pair(recipe, module, roles[Role.MISS]) for module, roles in found.modules.items())
    return joined(Proposal(pairs=pairs, features=("miss",)), propose_whole(recipe, found.keys, entries))


def _pair(recipe: Recipe, module: str, block: TensorEntry) -> PairProposal:
    """In the mini form the block has mini_r columns and is repeated over the outputs, which it must divide."""
    require_matrix(block)
    mini_r = recipe.number("mini_r")
    assert isinstance(mini_r, int)
    if mini_r and block.shape[1] != mini_r:
        raise shape_mismatch(block.name, f"the tensor is {list(block.shape)}, the config says mini_r={mini_r}")
    return PairProposal(
        source=module,
        inputs=(block.name,),
        scale=1.0,
        lora_rank=block.shape[0],
        declared_rank=recipe.scales.r,
        out_features=None if mini_r else block.shape[1],
        fits=partial(repeats_fit, lora_rank=block.shape[0], width=block.shape[1]),
        fold=shared_inputs,
    )
