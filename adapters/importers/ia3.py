"""IA3: outputs [out, 1] of a linear, its bias among them, or the inputs [1, in] of a feed-forward one are multiplied.

The shape says which; where the config lists the feed-forward modules, the two must agree. Knows nothing of the base.
"""

from adapters.errors import AdapterRefused, RefusalCode
from adapters.importers.method_modules import Entries, read_modules
from adapters.key_roles import Role
from adapters.proposal import Proposal, VectorProposal, joined
from adapters.propose_whole import propose_whole
from adapters.recipe import Recipe
from adapters.refusals import shape_mismatch
from adapters.safetensors_header import TensorEntry, require_matrix


def propose_ia3(recipe: Recipe, entries: Entries) -> Proposal:
    found = read_modules(entries, (Role.IA3,))
    vectors = tuple(_vector(recipe, module, roles[Role.IA3]) for module, roles in found.modules.items())
    return joined(Proposal(vectors=vectors, features=("ia3",)), propose_whole(recipe, found.keys, entries))


def _vector(recipe: Recipe, module: str, entry: TensorEntry) -> VectorProposal:
    require_matrix(entry)
    if 1 not in entry.shape:
        raise shape_mismatch(entry.name, f"the tensor is {list(entry.shape)}; IA3 has [out, 1] or [1, in]")
    if entry.shape == (1, 1):
        why = "the tensor is [1, 1], which is an output's as well as an input's"
        raise AdapterRefused(RefusalCode.AMBIGUOUS_LAYOUT, why, "Leave the module out", tensor=entry.name)
    feedforward = recipe.number("feedforward")
    assert isinstance(feedforward, tuple)
    is_listed = any(f".{module}".endswith(f".{name}") for name in feedforward)
    if feedforward and is_listed != (entry.shape[0] == 1):
        said = "is" if is_listed else "is not"
        why = f"the tensor is {list(entry.shape)}, and {module} {said} among feedforward_modules"
        raise shape_mismatch(entry.name, why, feature="feedforward_modules")
    return VectorProposal(kind="ia3", source=module, input=entry.name)
