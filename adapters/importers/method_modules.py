"""The tensors of a method other than LoRA, module by module, with what propose_whole.py reads set apart."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from adapters.key_roles import Role, TensorKey, by_module, read_keys, require_roles
from adapters.lora_config import MAX_SCALE
from adapters.propose_whole import WHOLE_ROLES
from adapters.refusals import CONVOLUTION, incomplete, shape_mismatch, unsupported_scale
from adapters.safetensors_header import TensorEntry

Entries = Mapping[str, TensorEntry]


@dataclass(frozen=True, slots=True)
class MethodModules:
    """`modules`: module → role → tensor, of the method's own roles, all of them present."""

    keys: tuple[TensorKey, ...]
    modules: Mapping[str, Mapping[Role, TensorEntry]]


def read_modules(entries: Entries, needed: Sequence[Role], also: Collection[Role] = ()) -> MethodModules:
    """Raises AdapterRefused: adapter_key_unmatched for a tensor of another role, adapter_incomplete_pair for a module
    that lacks one of `needed`."""
    keys = read_keys(sorted(entries))
    for key in keys:
        if key.role is Role.CONV:
            raise CONVOLUTION.error(tensor=key.key)
    require_roles(keys, {*needed, *also, *WHOLE_ROLES})
    modules = by_module(key for key in keys if key.role in needed)
    for module, roles in modules.items():
        for role in needed:
            if role not in roles:
                why = f"{module} has no {role.name.lower()} beside it, so it cannot be computed"
                raise incomplete(next(iter(roles.values())), why)
    found = {module: {role: entries[key] for role, key in roles.items()} for module, roles in modules.items()}
    return MethodModules(tuple(keys), found)


def require_shape(entry: TensorEntry, wanted: tuple[int, ...]) -> None:
    if entry.shape != wanted:
        raise shape_mismatch(entry.name, f"the tensor is {list(entry.shape)}; its module's others need {list(wanted)}")


def bounded(scale: float, feature: str) -> float:
    """Raises AdapterRefused when |s| is past what any adapter needs."""
    if abs(scale) > MAX_SCALE:
        raise unsupported_scale(scale, MAX_SCALE, feature)
    return scale
