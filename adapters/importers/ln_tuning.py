"""LN tuning: weights and biases of norms are replaced. Knows nothing of the base."""

from adapters.errors import AdapterRefused, RefusalCode
from adapters.importers.method_modules import Entries, read_modules
from adapters.key_roles import Role
from adapters.proposal import Proposal, VectorProposal, joined
from adapters.propose_whole import propose_whole
from adapters.recipe import Recipe


def propose_ln_tuning(recipe: Recipe, entries: Entries) -> Proposal:
    found = read_modules(entries, (Role.NORM_WEIGHT,), also=(Role.NORM_BIAS,))
    vectors = []
    for key in found.keys:
        if key.role not in (Role.NORM_WEIGHT, Role.NORM_BIAS):
            continue
        if len(entries[key.key].shape) != 1:
            raise AdapterRefused(
                RefusalCode.UNSUPPORTED,
                f"the tensor has {len(entries[key.key].shape)} dimensions, and is not of a norm",
                "Target norms only",
                feature=f"target_modules={key.module}",
                tensor=key.key,
            )
        kind = VectorProposal(kind="norm" if key.role is Role.NORM_WEIGHT else "bias", source=key.module, input=key.key)
        vectors.append(kind)
    own = Proposal(vectors=tuple(vectors), features=("ln_tuning",))
    return joined(own, propose_whole(recipe, found.keys, entries))
