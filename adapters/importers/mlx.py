"""MLX-LM's adapters.safetensors: y = W x + scale · (x · lora_a) · lora_b, the scale being used as it stands.

Both halves are stored the other way round than PEFT's, DoRA's magnitude is `m`, and LoRA on an embedding acts on a head
that is tied to it, too. Whether a module is an embedding is said by no tensor, so its name decides. Knows nothing of
the base.
"""

import re
from collections.abc import Mapping

from adapters.folds import transposed
from adapters.importers.method_modules import Entries, bounded, require_shape
from adapters.key_roles import Role, by_module, read_mlx_keys
from adapters.proposal import EmbeddingProposal, ExpertProposal, PairProposal, Proposal
from adapters.recipe import Recipe
from adapters.refusals import MLX_EMBEDDING_DORA, MLX_EXPERTS, MLX_QUANTISED, incomplete, shape_mismatch, unmatched
from adapters.safetensors_header import TensorEntry, require_matrix

EMBEDDINGS = frozenset("embed_tokens wte tok_embeddings word_embeddings embed_in embedding".split())
"""How MLX-LM's models call the embedding of tokens."""
_SWITCH = re.compile(r"(?P<outer>(?:.*\.)?)(?:switch_mlp|experts)\.(?P<part>gate|up|down)_proj")
"""What MLX-LM calls the projections of all experts, which it keeps apart."""
_QUANTISED = ("lora_a_scales", "lora_a_biases", "lora_b_scales", "lora_b_biases", "scales", "biases")

Roles = Mapping[Role, str]


def propose_mlx(recipe: Recipe, entries: Entries) -> Proposal:
    for key in entries:
        if key.rpartition(".")[2] in _QUANTISED:
            raise MLX_QUANTISED.error(tensor=key)
    modules = all_of = by_module(read_mlx_keys(sorted(entries)))
    _check_dora(recipe, modules)
    experts = {module: found for module, roles in modules.items() if (found := _experts(module, roles, entries))}
    modules = {module: roles for module, roles in modules.items() if module not in experts}
    is_embedding = {module: module.rpartition(".")[2] in EMBEDDINGS for module in modules}
    return Proposal(
        pairs=tuple(_pair(recipe, m, roles, entries) for m, roles in modules.items() if not is_embedding[m]),
        embeddings=tuple(_embedding(recipe, m, roles, entries) for m, roles in modules.items() if is_embedding[m]),
        experts=tuple(_stacked(recipe, found, all_of[m], entries) for m, found in experts.items()),
        features=("mlx", "dora") if recipe.number("is_dora") else ("mlx",),
    )


def _check_dora(recipe: Recipe, modules: Mapping[str, Roles]) -> None:
    for roles in modules.values():
        if Role.MLX_M in roles and not recipe.number("is_dora"):
            raise unmatched(roles[Role.MLX_M], "the config does not say fine_tune_type=dora, which would explain it")
        if Role.MLX_M not in roles and recipe.number("is_dora"):
            why = "the config says fine_tune_type=dora, and the module has no m"
            raise incomplete(next(iter(roles.values())), why, feature="fine_tune_type=dora")


def _pair(recipe: Recipe, module: str, roles: Roles, entries: Entries) -> PairProposal:
    lora_a, lora_b = _both(module, roles, entries)
    magnitude = roles.get(Role.MLX_M)
    if magnitude is not None:
        require_shape(entries[magnitude], (lora_b.shape[1],))
    return PairProposal(
        source=module,
        inputs=(lora_a.name, lora_b.name),
        scale=_scale(recipe),
        lora_rank=lora_b.shape[0],
        declared_rank=recipe.scales.r,
        in_features=lora_a.shape[0],
        out_features=lora_b.shape[1],
        fold=transposed,
        magnitude=magnitude,
    )


def _experts(module: str, roles: Roles, entries: Entries) -> "re.Match[str] | None":
    """Of a projection of all experts: B has three dimensions."""
    found = _SWITCH.fullmatch(module)
    return found if found and any(len(entries[key].shape) == 3 for key in roles.values()) else None


def _stacked(recipe: Recipe, found: "re.Match[str]", roles: Roles, entries: Entries) -> ExpertProposal:
    """As LoRASwitchLinear holds it: A [E, r, in], or [E·r, in] before 2025, and B [E, out, r]."""
    if Role.MLX_M in roles:
        raise MLX_EXPERTS.error(tensor=roles[Role.MLX_M])
    lora_a, lora_b = _halves(found[0], roles, entries)
    if len(lora_b.shape) != 3 or len(lora_a.shape) not in (2, 3):
        raise MLX_EXPERTS.error(tensor=lora_b.name)
    lora_rank = lora_b.shape[2]
    if recipe.scales.r != lora_rank:
        why = f"the tensor is {list(lora_b.shape)}, of rank {lora_rank}; the config says {recipe.scales.r}"
        raise shape_mismatch(lora_b.name, why, feature=f"rank={recipe.scales.r}")
    return ExpertProposal(
        source=f"{found['outer']}experts",
        parameter=found["part"],
        inputs=(lora_a.name, lora_b.name),
        form="stacked",
        scale=_scale(recipe),
        lora_rank=lora_rank,
    )


def _embedding(recipe: Recipe, module: str, roles: Roles, entries: Entries) -> EmbeddingProposal:
    if Role.MLX_M in roles:
        raise MLX_EMBEDDING_DORA.error(tensor=roles[Role.MLX_M])
    lora_a, lora_b = _both(module, roles, entries)
    return EmbeddingProposal(
        source=module,
        lora_a=lora_a.name,
        lora_b=lora_b.name,
        scale=_scale(recipe),
        lora_rank=lora_b.shape[0],
        declared_rank=recipe.scales.r,
        is_transposed=True,
        on_tied_head=True,
    )


def _halves(module: str, roles: Roles, entries: Entries) -> tuple[TensorEntry, TensorEntry]:
    for role in (Role.MLX_A, Role.MLX_B):
        if role not in roles:
            raise incomplete(next(iter(roles.values())), f"{module} has no {role.name.lower()[4:]} half")
    return entries[roles[Role.MLX_A]], entries[roles[Role.MLX_B]]


def _both(module: str, roles: Roles, entries: Entries) -> tuple[TensorEntry, TensorEntry]:
    lora_a, lora_b = _halves(module, roles, entries)
    for entry in (lora_a, lora_b):
        if len(entry.shape) == 3:
            raise MLX_EXPERTS.error(tensor=entry.name)
        require_matrix(entry)
    require_shape(lora_a, (lora_a.shape[0], lora_b.shape[0]))
    return lora_a, lora_b


def _scale(recipe: Recipe) -> float:
    scale = recipe.number("scale")
    assert isinstance(scale, float)
    return bounded(scale, f"lora_parameters.scale={scale:g}")
