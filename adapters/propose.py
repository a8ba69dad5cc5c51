"""Config and header of an adapter → Proposal: the one door to all readers of methods and formats.

A pure function: no file, no tensor's data, no base. Knows which reader is for which method and nothing of what they do.
"""

from collections.abc import Mapping

from adapters.importers.registry import PROPOSE
from adapters.proposal import Proposal
from adapters.recipe import Recipe
from adapters.refusals import unmatched
from adapters.safetensors_header import TensorEntry


def propose(recipe: Recipe, entries: Mapping[str, TensorEntry]) -> Proposal:
    """What the tensors mean, by the names that stand in the file. Raises AdapterRefused naming a tensor or a feature.

    Each name stands in one input of the Proposal, or is dropped; VeRA's two shared projections are inputs of every
    pair.
    """
    found = PROPOSE[recipe.method](recipe, entries)
    if len(found.dropped) == len(entries):
        raise unmatched(next(iter(entries)), "nothing in the file changes what the base computes")
    return found
