"""Pairs of fused experts, from config and names to what they propose: PEFT's on bare parameters, and single experts'.

PEFT names no parameter: it wraps a module once for each parameter it adapts, in the module's order, so the innermost
pair is gate_up_proj's and the outermost down_proj's, or the only one's. Knows nothing of the base.
"""

import re
from collections.abc import Mapping, Sequence

from adapters.key_roles import Role
from adapters.proposal import ExpertProposal
from adapters.recipe import Recipe
from adapters.refusals import EXPERT_B_LAYOUT, EXPERT_LAYOUT, FUSED_EXPERTS, incomplete, shape_mismatch
from adapters.safetensors_header import TensorEntry, require_matrix
from adapters.untrusted_json import shown

PROJECTIONS: Mapping[str, str] = {
    **{name: name.removesuffix("_proj") for name in ("gate_proj", "up_proj", "down_proj")},
    "w1": "gate",
    "w3": "up",
    "w2": "down",
}
"""What single experts' linears are called, in Mixtral's first files too."""
_PARAMETERS = ("gate_up_proj", "down_proj")  # in the order of every fused module of transformers
_FUSED = re.compile(r"(?P<experts>(?:.*\.)?experts)(?P<wrappers>(?:\.base_layer)*)")
_STACKED = re.compile(rf"(?P<experts>(?:.*\.)?experts)\.(?P<part>{'|'.join(PROJECTIONS)})")
_SINGLE = re.compile(rf"(?P<experts>(?:.*\.)?experts)\.(?P<expert>0|[1-9]\d{{0,4}})\.(?P<part>{'|'.join(PROJECTIONS)})")

Roles = Mapping[Role, str]
Entries = Mapping[str, TensorEntry]


def is_of_experts(recipe: Recipe, module: str, roles: Roles, entries: Entries) -> bool:
    """Whether a pair on `module` is of fused experts, of one expert, or of one projection of all. Without
    target_parameters a module that ends in `experts` would be a linear of that name."""
    is_stacked = any(len(entries[key].shape) == 3 for key in roles.values())
    if _SINGLE.fullmatch(module) or (is_stacked and _STACKED.fullmatch(module)):
        return True
    return bool(recipe.target_parameters) and bool(_FUSED.fullmatch(module))


def propose_experts(recipe: Recipe, modules: Mapping[str, Roles], entries: Entries) -> tuple[ExpertProposal, ...]:
    """Raises AdapterRefused naming a tensor or the field."""
    wrapped: dict[str, dict[int, Roles]] = {}
    single = []
    for module, roles in modules.items():
        if (found := _SINGLE.fullmatch(module)) is not None:
            single.append(_single(recipe, module, found, roles, entries))
        elif (found := _STACKED.fullmatch(module)) is not None:
            single.append(_stacked(recipe, module, found, roles, entries))
        elif (fused := _FUSED.fullmatch(module)) is not None:
            wrapped.setdefault(fused["experts"], {})[fused["wrappers"].count(".")] = roles
    targeted = [name for name in _PARAMETERS if any(t.rpartition(".")[2] == name for t in recipe.target_parameters)]
    if targeted and not wrapped and not single:
        why = "target_parameters names parameters of experts, and no tensor in the file is a pair of theirs"
        raise EXPERT_LAYOUT.error(feature=f"target_parameters={shown(list(recipe.target_parameters))}", why=why)
    fused_pairs = [
        _fused(recipe, experts, parameter, roles, entries)
        for experts, by_depth in wrapped.items()
        for parameter, roles in _by_parameter(by_depth, targeted)
    ]
    return (*single, *fused_pairs)


def _by_parameter(by_depth: Mapping[int, Roles], targeted: Sequence[str]) -> list[tuple[str, Roles]]:
    """The deepest wrapper is the first parameter's."""
    if sorted(by_depth) != list(range(len(targeted))):
        tensor = next(iter(by_depth[max(by_depth)].values()))
        why = (
            f"{len(by_depth)} wrapped parameters stand in the file, target_parameters names {len(targeted)} of experts"
        )
        raise EXPERT_LAYOUT.error(feature="target_parameters", tensor=tensor, why=why)
    return [(name, by_depth[len(targeted) - 1 - number]) for number, name in enumerate(targeted)]


def _fused(recipe: Recipe, experts: str, parameter: str, roles: Roles, entries: Entries) -> ExpertProposal:
    lora_a, lora_b = _both(roles, entries)
    name = f"{experts}.{parameter}"  # what patterns of ranks are matched against
    lora_rank = recipe.scales.rank_of(name)
    if recipe.expert_b_layout is None and recipe.unsloth_fixed and lora_rank > 1:
        raise EXPERT_B_LAYOUT.error(tensor=lora_b.name)
    return ExpertProposal(
        source=experts,
        parameter=parameter,
        inputs=(lora_a.name, lora_b.name),
        form=recipe.expert_b_layout or "rank_major",
        scale=recipe.scales.scale_of(name),
        lora_rank=lora_rank,
        peft_version=_version_of(recipe),
    )


def _single(recipe: Recipe, module: str, found: "re.Match[str]", roles: Roles, entries: Entries) -> ExpertProposal:
    lora_a, lora_b = _both(roles, entries)
    return ExpertProposal(
        source=found["experts"],
        parameter=PROJECTIONS[found["part"]],
        inputs=(lora_a.name, lora_b.name),
        form="single",
        scale=recipe.scales.scale_of(module),
        lora_rank=recipe.scales.rank_of(module),
        expert=int(found["expert"]),
    )


def _stacked(recipe: Recipe, module: str, found: "re.Match[str]", roles: Roles, entries: Entries) -> ExpertProposal:
    lora_a, lora_b = _both(roles, entries, num_dimensions=3)
    return ExpertProposal(
        source=found["experts"],
        parameter=PROJECTIONS[found["part"]],
        inputs=(lora_a.name, lora_b.name),
        form="stacked",
        scale=recipe.scales.scale_of(module),
        lora_rank=recipe.scales.rank_of(module),
    )


def _both(roles: Roles, entries: Entries, *, num_dimensions: int = 2) -> tuple[TensorEntry, TensorEntry]:
    for role in roles:
        if role not in (Role.A, Role.B):
            raise FUSED_EXPERTS.error(tensor=roles[role])
    for role, name in ((Role.A, "lora_A"), (Role.B, "lora_B")):
        if role not in roles:
            raise incomplete(
                next(iter(roles.values())), f"the experts have no {name} beside it, so they cannot be computed"
            )
        if num_dimensions == 2:
            require_matrix(entries[roles[role]])
        elif len(entries[roles[role]].shape) != num_dimensions:
            raise shape_mismatch(roles[role], f"the tensor is {list(entries[roles[role]].shape)} beside one of experts")
    return entries[roles[Role.A]], entries[roles[Role.B]]


def _version_of(recipe: Recipe) -> tuple[int, int] | None:
    """(major, minor) of the PEFT that wrote it."""
    numbers = re.match(r"(\d+)\.(\d+)", recipe.peft_version or "")
    return None if numbers is None else (int(numbers[1]), int(numbers[2]))
