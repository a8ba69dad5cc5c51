"""A PEFT LoRA adapter, from config and header to what it proposes: pairs of linears and embeddings, with what the
variants of LoRA change in them, and all that propose_whole.py reads.

The tensors decide what exists, the config decides scales and how it is stored, and where they contradict each other
the adapter is refused. Knows nothing of the base.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from adapters.folds import blocks_of_a, blocks_of_b, pooled, pooled_fits
from adapters.key_roles import Role, TensorKey, by_module, read_keys, require_roles
from adapters.proposal import EmbeddingProposal, PairProposal, Proposal, joined
from adapters.propose_experts import is_of_experts, propose_experts
from adapters.propose_whole import WHOLE_ROLES, propose_whole
from adapters.recipe import Recipe
from adapters.refusals import (
    DORA_DENIED,
    FUSED_EXPERTS,
    LORA_BIAS_DENIED,
    TORCHTUNE_MAGNITUDE,
    VARIANTS_COMBINED,
    incomplete,
    shape_mismatch,
    unmatched,
)
from adapters.safetensors_header import TensorEntry, require_matrix
from adapters.untrusted_json import shown

_PAIR_ROLES = frozenset(
    {Role.A, Role.B, Role.B_BIAS, Role.MAGNITUDE, Role.EMBEDDING_A, Role.EMBEDDING_B},
)
_TRAINING_ROLES = {Role.VELORA: "velora_config", Role.MONTECLORA: "monteclora_config"}
_REORDERED = frozenset("q_proj k_proj".split())
"""What torchtune reorders: it exports these names and no others for queries and keys."""

Roles = Mapping[Role, str]
Entries = Mapping[str, TensorEntry]


def propose_lora(recipe: Recipe, entries: Entries) -> Proposal:
    """Raises AdapterRefused naming the tensor or the field."""
    keys = read_keys(sorted(entries))
    require_roles(keys, _PAIR_ROLES | WHOLE_ROLES | _TRAINING_ROLES.keys())
    modules = by_module(key for key in keys if key.role in _PAIR_ROLES)
    _check_dora(recipe, modules)
    experts = {module: roles for module, roles in modules.items() if is_of_experts(recipe, module, roles, entries)}
    modules = {module: roles for module, roles in modules.items() if module not in experts}
    own = Proposal(
        pairs=tuple(_pair(recipe, m, roles, entries) for m, roles in modules.items() if not _is_embedding(roles)),
        embeddings=tuple(_embedding(recipe, m, roles, entries) for m, roles in modules.items() if _is_embedding(roles)),
        experts=propose_experts(recipe, experts, entries),
        invocation_tokens=recipe.invocation_tokens,
        dropped=_dropped(recipe, keys),
        features=_features(recipe, modules),
        warnings=_warnings(recipe, modules),
    )
    return joined(own, propose_whole(recipe, keys, entries))


def _is_embedding(roles: Roles) -> bool:
    return Role.EMBEDDING_A in roles or Role.EMBEDDING_B in roles


def _dropped(recipe: Recipe, keys: Sequence[TensorKey]) -> tuple[str, ...]:
    """Tensors of variants that act in training alone, if the config says that it is one."""
    dropped = [key for key in keys if key.role in _TRAINING_ROLES]
    for key in dropped:
        if _TRAINING_ROLES[key.role] not in recipe.training_only:
            raise unmatched(key.key, f"the config does not say {_TRAINING_ROLES[key.role]}, which would explain it")
    return tuple(key.key for key in dropped)


def _check_dora(recipe: Recipe, modules: Mapping[str, Roles]) -> None:
    magnitudes = {module: roles[Role.MAGNITUDE] for module, roles in modules.items() if Role.MAGNITUDE in roles}
    if not magnitudes and not recipe.use_dora:
        return
    if recipe.use_dora is False:
        raise DORA_DENIED.error(tensor=next(iter(magnitudes.values())))
    for module, roles in modules.items():
        if module not in magnitudes:
            why = f"DoRA scales every module that it adapts, and {shown(module)} has no lora_magnitude_vector"
            raise incomplete(next(iter(roles.values())), why, feature="use_dora")
    if recipe.lora_bias:
        raise VARIANTS_COMBINED.error(feature="use_dora and lora_bias")
    for module, key in magnitudes.items():
        if recipe.peft_version is not None and _is_reordered(recipe, module):  # some other program's then
            raise TORCHTUNE_MAGNITUDE.error(tensor=key)


def _is_reordered(recipe: Recipe, module: str) -> bool:
    return recipe.use_dora is None and module.rpartition(".")[2] in _REORDERED


def _pair(recipe: Recipe, module: str, roles: Roles, entries: Entries) -> PairProposal:
    if f".{module}".endswith(".base_layer"):
        raise FUSED_EXPERTS.error(tensor=next(iter(roles.values())))
    lora_a, lora_b = _both(roles, Role.A, Role.B, entries)
    bias, magnitude = _bias_of_b(recipe, roles), roles.get(Role.MAGNITUDE)
    for vector in (bias, magnitude):
        _check_vector(vector, lora_b.shape[0], entries)
    plain = PairProposal(
        source=module,
        inputs=(lora_a.name, lora_b.name),
        scale=recipe.scales.scale_of(module),
        lora_rank=lora_a.shape[0],
        declared_rank=recipe.scales.rank_of(module),
        in_features=lora_a.shape[1],
        out_features=lora_b.shape[0],
        magnitude=magnitude,
        gain_covers_bias=magnitude is not None and recipe.use_dora is None,
        is_interleaved=magnitude is not None and _is_reordered(recipe, module),
        bias=bias,
    )
    if recipe.bdlora is not None:
        return _in_blocks(recipe, plain, lora_a, lora_b)
    return _pooled(recipe.qalora_group, plain, lora_a, lora_b) if recipe.qalora_group else plain


def _both(roles: Roles, a: Role, b: Role, entries: Entries) -> tuple[TensorEntry, TensorEntry]:
    """A and B, two matrices. A pair of a linear and one of an embedding do not stand on one module."""
    if len(roles.keys() & {Role.A, Role.EMBEDDING_A}) > 1 or len(roles.keys() & {Role.B, Role.EMBEDDING_B}) > 1:
        raise unmatched(next(iter(roles.values())), "the module has a pair of a linear and one of an embedding")
    for role, name in ((a, "lora_A"), (b, "lora_B")):
        if role not in roles:
            raise incomplete(
                next(iter(roles.values())), f"the module has no {name} beside it, so it cannot be computed"
            )
        require_matrix(entries[roles[role]])
    return entries[roles[a]], entries[roles[b]]


def _bias_of_b(recipe: Recipe, roles: Roles) -> str | None:
    bias = roles.get(Role.B_BIAS)
    if bias is not None and not recipe.lora_bias:
        raise LORA_BIAS_DENIED.error(tensor=bias)
    if bias is None and recipe.lora_bias:
        raise incomplete(roles[Role.B], "the config says lora_bias, and this B has none", feature="lora_bias")
    return bias


def _check_vector(key: str | None, width: int, entries: Entries) -> None:
    if key is not None and entries[key].shape != (width,):
        raise shape_mismatch(key, f"the tensor is {list(entries[key].shape)}; its module needs {[width]}")


def _in_blocks(recipe: Recipe, plain: PairProposal, lora_a: TensorEntry, lora_b: TensorEntry) -> PairProposal:
    """BD-LoRA: which half of a module is in blocks is said by a list of parts of names."""
    assert recipe.bdlora is not None
    name, num_blocks = plain.source.rpartition(".")[2], recipe.bdlora.num_blocks
    is_a, is_b = (any(part in name for part in parts) for parts in (recipe.bdlora.a, recipe.bdlora.b))
    if is_a == is_b and (is_a or recipe.bdlora.is_strict):
        why = f"{shown(name)} is in {'both' if is_a else 'neither'} of use_bdlora's lists of blocks"
        raise shape_mismatch(lora_a.name, why, feature="use_bdlora")
    if not is_a and not is_b:
        return plain
    width = lora_b.shape[1] * num_blocks if is_b else lora_b.shape[1]
    rows = lora_a.shape[0] if is_a else lora_b.shape[0]
    if rows % num_blocks or width != lora_a.shape[0]:
        key = lora_a.name if is_a and rows % num_blocks else lora_b.name
        why = f"A is {list(lora_a.shape)} and B {list(lora_b.shape)}, which are not a pair in {num_blocks} blocks"
        raise shape_mismatch(key, why, feature="use_bdlora")
    if is_b:
        return replace(plain, fold=partial(blocks_of_b, num_blocks=num_blocks))
    return replace(plain, fold=partial(blocks_of_a, num_blocks=num_blocks), in_features=lora_a.shape[1] * num_blocks)


def _pooled(group: int, plain: PairProposal, lora_a: TensorEntry, lora_b: TensorEntry) -> PairProposal:
    """PEFT pools on GPTQ's linears alone: on others it writes a plain pair under the same config."""
    _check_ranks(lora_a, lora_b)
    width = lora_a.shape[1]
    fold = partial(pooled, group=group)
    fits = partial(pooled_fits, width=width, group=group)
    return replace(plain, in_features=None, fold=fold, fits=fits)


def _check_ranks(lora_a: TensorEntry, lora_b: TensorEntry) -> None:
    if lora_b.shape[1] != lora_a.shape[0]:
        raise shape_mismatch(lora_b.name, f"B is {list(lora_b.shape)} beside an A of {list(lora_a.shape)}")


def _embedding(recipe: Recipe, module: str, roles: Roles, entries: Entries) -> EmbeddingProposal:
    lora_a, lora_b = _both(roles, Role.EMBEDDING_A, Role.EMBEDDING_B, entries)
    if Role.B_BIAS in roles or recipe.lora_bias:
        raise VARIANTS_COMBINED.error(feature="lora_bias and an embedding", tensor=lora_b.name)
    _check_ranks(lora_a, lora_b)
    magnitude = roles.get(Role.MAGNITUDE)
    _check_vector(magnitude, lora_b.shape[0], entries)
    return EmbeddingProposal(
        source=module,
        lora_a=lora_a.name,
        lora_b=lora_b.name,
        scale=recipe.scales.scale_of(module),
        lora_rank=lora_a.shape[0],
        declared_rank=recipe.scales.rank_of(module),
        magnitude=magnitude,
    )


def _features(recipe: Recipe, modules: Mapping[str, Roles]) -> tuple[str, ...]:
    found = {
        "dora": any(Role.MAGNITUDE in roles for roles in modules.values()),
        "lora_bias": recipe.lora_bias,
        "embedding": any(_is_embedding(roles) for roles in modules.values()),
        "bdlora": recipe.bdlora is not None,
        "qalora": recipe.qalora_group is not None,
        "alora": bool(recipe.invocation_tokens),
    }
    return (*recipe.scales.features, *(name for name, is_found in found.items() if is_found))


def _warnings(recipe: Recipe, modules: Mapping[str, Roles]) -> tuple[str, ...]:
    if recipe.use_dora is None and any(Role.MAGNITUDE in roles for roles in modules.values()):
        return ("the file has DoRA magnitudes and the config no use_dora, as torchtune writes it: served as its DoRA",)
    return ()
