"""An adapter's folder → LoRAModel, or a refusal that names the tensor or field: every tensor is consumed or none is.

The order is the defence: config, headers, names, shapes, rank and size are all settled before the first byte of data
is read (placement.py); then each tensor is read into private memory, hashed, checked for finite values, scaled and
cast (run_plan.py). Neither PEFT nor transformers ever sees the folder. Knows nothing of names, leases or devices.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch

from adapters.adapter_folder import AdapterFolder
from adapters.base_weights import BaseWeights
from adapters.errors import AdapterRefused, RefusalCode
from adapters.header_table import HeaderTable, read_table
from adapters.load_plan import LoadPlan, plan_load
from adapters.load_report import (
    LoadReport,
    absent_targets,
    embedding_norm,
    expert_norm,
    has_effect,
    idle_modules,
    norms_by_kind,
    report_of,
)
from adapters.lora_config import CONFIG_NAME, MAX_CONFIG_BYTES
from adapters.lora_model import LoRAModel
from adapters.module_names import BaseModules
from adapters.own_tokenizer import OwnTokenizers, unread_tokens
from adapters.packed_modules import kind_of
from adapters.place_experts import EXPANSION
from adapters.placement import place
from adapters.plan_cache import PlanCache
from adapters.proposal import Proposal
from adapters.propose import propose
from adapters.read_options import NO_OPTIONS, ReadOptions, ignored_among
from adapters.recipe import Recipe, read_recipe
from adapters.refusals import ACTIVATED_MORE, EXPERT_B_LAYOUT, no_fused_experts
from adapters.run_plan import Progress, Ran, run
from adapters.weight_files import WeightFiles, open_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointLimits:
    """What one adapter may take; rank and bytes of files are checked before anything is allocated for it."""

    max_lora_rank: int
    max_adapter_bytes: int  # of its weight files
    max_full_bytes: int = 512 << 20  # of embedding and head that it brings whole, in the compute dtype

    @property
    def max_expert_bytes(self) -> int:
        """Of pairs of fused experts as prepared."""
        return EXPANSION * self.max_adapter_bytes


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    model: LoRAModel
    report: LoadReport


def load_lora_model(
    folder: Path | AdapterFolder,
    base: BaseModules,
    *,
    limits: CheckpointLimits,
    dtype: torch.dtype,
    weights: BaseWeights | None = None,
    plans: PlanCache | None = None,
    tokenizers: OwnTokenizers | None = None,
    options: ReadOptions = NO_OPTIONS,
    progress: Progress | None = None,
) -> LoadedAdapter:
    """Load and check one adapter, its weights in `dtype` on the CPU. A folder that is open already stays open.

    `weights`: the base's own, which DoRA, replaced biases and whole embeddings are refused without. `plans`: those of
    earlier loads. `tokenizers`: what an adapter's own is compared with; without it none is taken. `progress` is told of
    the base's rows whose norms DoRA needs. Raises AdapterNotFound when the folder holds no adapter, AdapterRefused (any
    code) when it cannot be served exactly.
    """
    with AdapterFolder.find(folder) if isinstance(folder, Path) else nullcontext(folder) as place_of_it:
        with place_of_it.open(CONFIG_NAME) as file:
            recipe = _with_layout(read_recipe(file.read(MAX_CONFIG_BYTES + 1)), options.moe_lora_b_layout)
        with open_weights(place_of_it, max_bytes=limits.max_adapter_bytes) as files:
            plan = _plan(files, recipe, options, base, limits, dtype, plans)
            own = tokenizers.files_of(place_of_it) if tokenizers is not None else {}
            ran = run(
                plan,
                files.files,
                _canonical(recipe, own, plan.ignored),
                dtype,
                weights=weights,
                max_full_bytes=limits.max_full_bytes,
                progress=progress,
            )
        _check_activated(ran)
        unread = unread_tokens(place_of_it, ran.extras.vocab_size)
        return _loaded(plan, _with_tokenizer(ran, own), recipe, unread)


def _with_layout(recipe: Recipe, layout: str | None) -> Recipe:
    """What the config says and what whoever loads it says must not be two things."""
    said = recipe.expert_b_layout
    if layout is None or said == layout:
        return recipe
    if said is not None:
        why = f"adapter_config.json says lora_B_layout={said}, and the load asks for the other"
        raise EXPERT_B_LAYOUT.error(feature=f"moe_lora_b_layout={layout}", why=why)
    return replace(recipe, expert_b_layout=layout)


def _plan(
    files: WeightFiles,
    recipe: Recipe,
    options: ReadOptions,
    base: BaseModules,
    limits: CheckpointLimits,
    dtype: torch.dtype,
    plans: PlanCache | None,
) -> LoadPlan:
    def make() -> LoadPlan:
        table, ignored = _without(read_table(files), options.ignore)
        proposal = propose(recipe, table.entries)
        _check_layout(options, proposal)
        placement = place(
            proposal,
            table.entries,
            base,
            max_lora_rank=limits.max_lora_rank,
            max_expert_bytes=limits.max_expert_bytes,
            base_model=recipe.scales.base_model,
        )
        return plan_load(placement, table, base, dtype, ignored=ignored)

    if plans is None:
        return make()
    # A plan holds its base, so that while it is kept no other base has the same id.
    return plans.plan((files.digest(), _plan_key(recipe), options, id(base), limits, dtype), make)


def _without(table: HeaderTable, patterns: Sequence[str]) -> tuple[HeaderTable, Mapping[str, int]]:
    """The tensors that are read, and the bytes of each that is not."""
    if not patterns:
        return table, {}
    ignored = ignored_among({name: stored.entry.num_bytes for name, stored in table.tensors.items()}, patterns)
    return HeaderTable({name: stored for name, stored in table.tensors.items() if name not in ignored}), ignored


def _check_layout(options: ReadOptions, proposal: Proposal) -> None:
    layout = options.moe_lora_b_layout
    if layout is not None and all(experts.form in ("single", "stacked") for experts in proposal.experts):
        raise no_fused_experts(f"moe_lora_b_layout={layout}")


def _plan_key(recipe: Recipe) -> bytes:
    """Digest of all that a plan hangs on. What is targeted the tensors say, and PEFT lists it in another order each
    time."""
    own = replace(recipe, scales=replace(recipe.scales, target_modules=(), base_model=None))
    what = (own.use_dora, own.modules_to_save, sorted(own.training_only), own.task_type)
    wrote = (own.target_parameters, own.unsloth_fixed, own.peft_version)
    return hashlib.sha256(own.canonical() + repr((what, wrote)).encode()).digest()


def _canonical(recipe: Recipe, tokenizer: Mapping[str, bytes], ignored: Iterable[str]) -> bytes:
    """Everything beside the tensors that an adapter is: the config, a tokenizer of its own where it has one, and what
    was left out of the files where that was asked for."""
    digests = "".join(f" {name} {hashlib.sha256(data).hexdigest()}" for name, data in sorted(tokenizer.items()))
    left_out = "".join(f" ignored {json.dumps(name)}" for name in ignored)
    return recipe.canonical() + (digests + left_out).encode()


def _check_activated(ran: Ran) -> None:
    """PEFT begins with the pairs of an activated adapter at its invocation, and with everything else at once; what is
    shared with the base before the invocation would not be the base's."""
    extras = ran.extras
    if extras.invocation_tokens and (extras.vocab_size is not None or any(True for _ in extras.tensors())):
        raise ACTIVATED_MORE.error()


def _with_tokenizer(ran: Ran, tokenizer: Mapping[str, bytes]) -> Ran:
    if not tokenizer:
        return ran
    replaced = ran.extras.replaced | {"tokenizer"}
    return replace(ran, extras=replace(ran.extras, tokenizer_files=tokenizer, replaced=replaced))


def _loaded(plan: LoadPlan, ran: Ran, recipe: Recipe, unread: Sequence[str]) -> LoadedAdapter:
    placed = plan.placement
    found = {
        "experts": bool(ran.extras.experts),
        "router": any(name in plan.base.routers for name in ran.modules),
        "tokenizer": bool(ran.extras.tokenizer_files),
        f"renamed: {placed.rewrite}": bool(placed.rewrite),
    }
    features = (*placed.features, *(feature for feature, is_there in found.items() if is_there))
    norms = _checked_norms(ran, plan.base)
    model = LoRAModel(ran.version, ran.modules, features, norms, ran.extras)
    warnings = [
        *placed.warnings,
        *unread,
        *absent_targets(recipe.scales.target_modules, placed.adapted),
    ]
    warnings += idle_modules(ran.modules, ran.idle, has_more=has_effect(ran.extras))
    num_params = sum(
        place.lora_rank * (place.in_features + place.out_features) for place in plan.layout.places.values()
    )
    report = report_of(
        model,
        routers=plan.base.routers,
        num_params=num_params + sum(tensor.numel() for tensor in ran.extras.tensors()),
        base_model=recipe.scales.base_model,
        stored_dtypes=(stored.entry.dtype for stored in plan.tensors.values()),
        warnings=warnings,
        dropped=(*placed.dropped, *ran.dropped),
        ignored=plan.ignored,
    )
    return LoadedAdapter(model, report)


def _checked_norms(ran: Ran, base: BaseModules) -> Mapping[str, float]:
    norms = norms_by_kind(ran.norms)
    if ran.extras.embedding is not None and ran.extras.embedding.lora_a is not None and base.embedding is not None:
        norms[kind_of(base.embedding.name)] = embedding_norm(ran.extras.embedding)
    if ran.extras.experts:
        norms["experts"] = expert_norm(ran.extras.experts)
    for kind, norm in norms.items():
        if not math.isfinite(norm):
            raise AdapterRefused(
                RefusalCode.NONFINITE,
                f"ΔW of the {kind} modules overflows float32, and so would every output",
                "The training diverged or the scale is wrong: check lora_alpha",
                tensor=kind,
            )
    return MappingProxyType(norms)
