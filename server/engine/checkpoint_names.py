"""How transformers renames what old checkpoints call the modules of a model: the names adapters of that time carry.

Only renames are taken, not what splits or joins weights; their patterns are transformers' own, never a file's. Knows
nothing of adapters.
"""

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightRenaming

from adapters.name_rewrites import Renaming

_SUFFIX = ".weight"  # the rules are for tensors


def checkpoint_namer(model: PreTrainedModel) -> Renaming:
    """A function from a module's name in any layout that transformers loads to its name in `model`."""
    rules = [rule for rule in get_model_conversion_mapping(model) if type(rule) in (WeightRenaming, PrefixChange)]

    def checkpoint_name(module: str) -> str:
        key = module + _SUFFIX
        for rule in rules:
            key, _ = rule.rename_source_key(key)
        return key.removesuffix(_SUFFIX)

    return checkpoint_name
