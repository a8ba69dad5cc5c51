"""All kinds of adapters of the conformance table: how each is trained, written and judged, and where it cannot exist.

A variant is made by PEFT (`config`), perhaps written anew by the rule of another producer (`rewrite`), and judged by
PEFT alone or, where PEFT is wrong, by dense weights. Knows nothing of what this server serves: cells.py says that.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
from peft import LoraConfig, PeftConfig

from tests.conformance import dialects, expert_files, fused_files, stacked_experts, torchtune_files
from tests.conformance.making import Make, altered, by_peft, converted, lora, plain, rewritten
from tests.conformance.traits import Traits, traits

Reason = str | None
INVOCATION = (20, 21)
TOKENS = (7, 3, 40)  # not ascending: PEFT keeps their order
NEW_TOKENS = 4


@dataclass(frozen=True, kw_only=True)
class Variant:
    name: str
    make: Make
    why_not: Callable[[Traits], Reason] = lambda _: None
    prompt_tokens: tuple[int, ...] = ()  # what its prompt must hold for the adapter to matter
    does_nothing: bool = False  # its oracle is the base


# Where a variant cannot exist


def needs_bias(t: Traits) -> Reason:
    return None if t.biased else "no linear has a bias"


def needs_tie(t: Traits) -> Reason:
    return None if t.is_tied else "the head is not tied"


def needs_no_tie(t: Traits) -> Reason:
    return "the head is tied" if t.is_tied else None


def needs_experts(t: Traits) -> Reason:
    return None if t.experts else "no experts"


def needs_linear_weights(t: Traits) -> Reason:
    return "PEFT does not do it on Conv1D" if t.is_transposed else None


def needs_fused(t: Traits) -> Reason:
    return None if t.architecture in ("phi3", "gpt2", "gpt_bigcode") else "no linear is fused from others"


def needs_parts(t: Traits) -> Reason:
    return None if any(True for _ in fused_files.wider(t)) else "q, k, v and gate, up are not apart"


def needs_biased_parts(t: Traits) -> Reason:
    return None if any(True for _ in fused_files.wider(t, biased=True)) else "no q, k and v apart that have biases"


def needs_wrapper(t: Traits) -> Reason:
    return None if t.is_wrapped else "one layout only"


def needs_plain_decoder(t: Traits) -> Reason:
    return "the text model is wrapped" if t.is_wrapped else None


def needs_split(t: Traits) -> Reason:
    return None if "q_proj" in t.leaves and not t.biased else "torchtune has no such model, or scales its biases, too"


def needs_torchtune(t: Traits) -> Reason:
    return None if t.architecture in ("llama", "mistral") else "torchtune's order of rows is not known for it"


def needs_rows_of_batch(t: Traits) -> Reason:
    return (
        "PEFT masks by row and position, which OPT's flattened layers do not have" if t.architecture == "opt" else None
    )


def needs_norm(t: Traits) -> Reason:
    return None if t.norms else "no norm"


def both(*reasons: Callable[[Traits], Reason]) -> Callable[[Traits], Reason]:
    return lambda t: next((reason for each in reasons if (reason := each(t)) is not None), None)


# The configs that take more than a line


def _patterns(t: Traits) -> LoraConfig:
    first = ".".join(t.linears[0].split(".")[-3:])
    return lora(t, rank_pattern={first: 6}, alpha_pattern={r".*\.1\..*": 32, t.leaves[0]: 3.5})


def _regex(t: Traits) -> LoraConfig:
    inside = r".*language_model\." if t.is_wrapped else r".*\."
    return LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules=rf"{inside}.*({'|'.join(t.leaves[:2])})")


def _block_diagonal(t: Traits) -> LoraConfig:
    """PEFT looks for a pattern anywhere in a leaf, so `dense` and `dense_4h_to_h` go together."""
    first = [leaf for leaf in t.leaves if t.leaves[0] in leaf]
    halves = {
        "target_modules_bd_a": first,
        "target_modules_bd_b": [leaf for leaf in t.leaves if leaf not in first],
    }
    return lora(t, use_bdlora=peft.tuners.lora.config.BdLoraConfig(**halves, nblocks=2, match_strict=False))


def _as_torchtune(t: Traits) -> LoraConfig:
    """Without queries and keys, whose rows torchtune reorders and their magnitudes not."""
    leaves = [leaf for leaf in t.leaves if leaf not in ("q_proj", "k_proj")]
    return lora(t, use_dora=True, target_modules=leaves)


def _tokens_of_both(t: Traits) -> LoraConfig:
    return lora(t, trainable_token_indices={t.last_embedding: [7, 3], t.last_head: [40, 5, 9]})


def _expert_targets(t: Traits, *names: str) -> list[str]:
    return [f"{module}.{name}" for module in t.experts for name in names]


def _experts(**changes: Any) -> Make:
    return by_peft(lambda t: lora(t, target_parameters=_expert_targets(t, "gate_up_proj", "down_proj"), **changes))


def _router(t: Traits) -> LoraConfig:
    return lora(t, target_parameters=[f"{name}.weight" for name in t.routers])


def _whole(*leaves: Callable[[Traits], str], **changes: Any) -> Make:
    return by_peft(lambda t: lora(t, modules_to_save=[leaf(t) for leaf in leaves], **changes))


def _norms(t: Traits) -> LoraConfig:
    return lora(t, modules_to_save=[t.norms[0], t.norms[-1]])


def embedding(t: Traits) -> str:
    return t.last_embedding


def head(t: Traits) -> str:
    return t.last_head


def _other(kind: str, **settings: Any) -> Make:
    """A method of PEFT's beside LoRA, on all linears."""
    return by_peft(
        lambda t: getattr(peft, kind)(task_type="CAUSAL_LM", **{"target_modules": list(t.linears), **settings})
    )


def _ia3(t: Traits) -> PeftConfig:
    inner = [name for name, (inputs, outputs) in t.shapes.items() if inputs > outputs] or [t.linears[-1]]
    return peft.IA3Config(task_type="CAUSAL_LM", feedforward_modules=inner, target_modules=list(t.linears))


LORA: tuple[Variant, ...] = (
    Variant(name="plain", make=plain()),
    Variant(name="rslora", make=plain(use_rslora=True)),
    Variant(name="patterns", make=by_peft(_patterns)),
    Variant(name="layers_to_transform", make=plain(layers_to_transform=[1])),
    Variant(name="regex", make=by_peft(_regex)),
    Variant(name="all_linear", make=plain(target_modules="all-linear", exclude_modules=None)),
    Variant(name="gaussian", make=plain(init_lora_weights="gaussian")),
    Variant(name="orthogonal", make=plain(init_lora_weights="orthogonal"), why_not=needs_linear_weights),
    Variant(name="mica", make=plain(init_lora_weights="mica"), why_not=needs_linear_weights),
    Variant(name="eva", make=plain(init_lora_weights="eva")),
    Variant(name="dora", make=plain(use_dora=True)),
    Variant(name="dora_bias", make=plain(use_dora=True, bias="all"), why_not=needs_bias),
    Variant(name="dora_unsaid", make=rewritten(by_peft(_as_torchtune), dialects.without_use_dora), why_not=needs_split),
    Variant(name="dora_torchtune", make=torchtune_files.dora_of_queries, why_not=needs_torchtune),
    Variant(name="lora_bias", make=plain(lora_bias=True), why_not=needs_bias),
    Variant(name="bias_all", make=plain(bias="all"), why_not=needs_bias),
    Variant(name="bias_lora_only", make=plain(bias="lora_only"), why_not=needs_bias),
    Variant(name="bdlora", make=by_peft(_block_diagonal), why_not=needs_linear_weights),
    Variant(name="qalora", make=dialects.pooled, why_not=needs_linear_weights),
)

TOKENS_AND_HEADS: tuple[Variant, ...] = (
    Variant(name="embed", make=by_peft(lambda t: lora(t, t.last_embedding))),
    Variant(name="embed_dora", make=by_peft(lambda t: lora(t, t.last_embedding, use_dora=True))),
    Variant(name="head", make=by_peft(lambda t: lora(t, t.last_head))),
    Variant(name="head_dora", make=by_peft(lambda t: lora(t, t.last_head, use_dora=True))),
    Variant(name="embed_head", make=by_peft(lambda t: lora(t, t.last_embedding, t.last_head))),
    Variant(
        name="embed_tied",
        make=dialects.tied,
        why_not=needs_tie,
    ),
    Variant(name="mts_embed", make=_whole(embedding)),
    Variant(name="mts_head", make=_whole(head)),
    Variant(name="mts_both", make=_whole(embedding, head)),
    Variant(name="mts_tied", make=_whole(embedding, ensure_weight_tying=True), why_not=needs_tie),
    Variant(name="mts_norm", make=by_peft(_norms), why_not=needs_norm),
    Variant(name="tokens", make=plain(trainable_token_indices=list(TOKENS)), prompt_tokens=TOKENS),
    Variant(name="tokens_head", make=by_peft(_tokens_of_both), why_not=needs_no_tie, prompt_tokens=(7, 3)),
    Variant(name="vocab_grown", make=by_peft(lora, resized=NEW_TOKENS), prompt_tokens=(96, 99)),
    Variant(name="vocab_shrunk", make=by_peft(lora, resized=-NEW_TOKENS)),
    Variant(
        name="vocab_grown_tokens",
        make=by_peft(lambda t: lora(t, t.last_embedding, t.last_head), resized=NEW_TOKENS),
        prompt_tokens=(97,),
    ),
)

INVOKED: tuple[Variant, ...] = tuple(
    Variant(
        name=f"alora_{word}",
        make=plain(alora_invocation_tokens=list(INVOCATION)),
        prompt_tokens=tokens,
        does_nothing=not tokens,
        why_not=both(needs_linear_weights, needs_rows_of_batch),
    )
    for word, tokens in {
        "never": (),
        "once": INVOCATION,
        "twice": (*INVOCATION, 9, 50, *INVOCATION),
    }.items()
)

DIALECTS: tuple[Variant, ...] = (
    Variant(name="infix", make=rewritten(plain(), dialects.infixed)),
    Variant(name="sharded", make=rewritten(plain(), dialects.sharded)),
    Variant(name="sharded_model_index", make=rewritten(plain(), dialects.sharded_as_model)),
    Variant(name="mixed_dtypes", make=altered(plain(), dialects.mixed_dtypes)),
    Variant(name="inner_wrappers", make=rewritten(plain(), dialects.inner_wrappers)),
    Variant(name="unsloth", make=rewritten(plain(), dialects.unsloth)),
    Variant(name="old_bias_keys", make=rewritten(plain(bias="all"), dialects.old_bias_keys), why_not=needs_bias),
    Variant(
        name="mlx",
        make=rewritten(plain(), dialects.mlx),
        why_not=both(needs_linear_weights, needs_plain_decoder),
    ),
    Variant(name="headless", make=rewritten(plain(), dialects.headless)),
    Variant(name="text_layout", make=rewritten(plain(), dialects.spelled("model.")), why_not=needs_wrapper),
    Variant(
        name="inner_layout", make=rewritten(plain(), dialects.spelled("language_model.model.")), why_not=needs_wrapper
    ),
    Variant(name="outer_layout", make=rewritten(plain(), dialects.spelled("language_model.")), why_not=needs_wrapper),
    Variant(name="bare_layout", make=rewritten(plain(), dialects.spelled("")), why_not=needs_wrapper),
    Variant(name="split_fused", make=expert_files.split_fused, why_not=needs_fused),
    Variant(name="split_dora", make=fused_files.split_with_dora, why_not=needs_fused),
    Variant(name="split_lora_bias", make=fused_files.split_with_bias, why_not=both(needs_fused, needs_bias)),
    Variant(name="joint", make=fused_files.joint(), why_not=needs_parts),
    Variant(name="joint_dora", make=fused_files.joint(use_dora=True), why_not=needs_parts),
    Variant(name="joint_lora_bias", make=fused_files.joint(lora_bias=True), why_not=needs_biased_parts),
)

CHANGED_BASES: tuple[Variant, ...] = (
    Variant(name="pissa", make=plain(init_lora_weights="pissa")),
    Variant(name="olora", make=plain(init_lora_weights="olora"), why_not=needs_linear_weights),
    Variant(name="kasa", make=by_peft(lambda t: lora(t, kasa_config=peft.tuners.lora.config.KasaConfig())),
            why_not=needs_linear_weights),
    Variant(name="pissa_converted", make=converted("pissa")),
    Variant(name="olora_converted", make=converted("olora"), why_not=needs_linear_weights),
    Variant(name="velora", make=plain(velora_config=peft.VeloraConfig()), why_not=needs_linear_weights),
    Variant(name="monteclora", make=plain(monteclora_config=peft.MontecloraConfig(num_samples=2, buffer_size=2)),
            why_not=needs_linear_weights),
)  # fmt: skip

EXPERTS: tuple[Variant, ...] = (
    Variant(name="experts", make=_experts(), why_not=needs_experts),
    Variant(name="experts_rslora", make=_experts(use_rslora=True), why_not=needs_experts),
    Variant(name="experts_grouped", make=rewritten(_experts(), expert_files.grouped_by_expert), why_not=needs_experts),
    Variant(
        name="experts_down",
        make=by_peft(lambda t: lora(t, target_parameters=_expert_targets(t, "down_proj"))),
        why_not=needs_experts,
    ),
    Variant(name="experts_each", make=expert_files.each_expert(use_rslora=False), why_not=needs_experts),
    Variant(
        name="experts_each_rslora",
        make=expert_files.each_expert(use_rslora=True),
        why_not=needs_experts,
    ),
    Variant(name="experts_shared_outer", make=stacked_experts.shared_outer, why_not=needs_experts),
    Variant(name="experts_mlx", make=stacked_experts.mlx(in_one_dimension=False), why_not=needs_experts),
    Variant(name="experts_mlx_old", make=stacked_experts.mlx(in_one_dimension=True), why_not=needs_experts),
    Variant(name="router", make=by_peft(_router), why_not=needs_experts),
)

METHODS: tuple[Variant, ...] = (
    Variant(name="adalora", make=_other("AdaLoraConfig", init_r=4, target_r=4, total_step=10, lora_alpha=8)),
    Variant(name="vera", make=_other("VeraConfig", r=8, save_projection=True), why_not=needs_linear_weights),
    Variant(name="loha", make=_other("LoHaConfig", r=2, alpha=4), why_not=needs_linear_weights),
    Variant(name="delora", make=_other("DeloraConfig", r=4, delora_lambda=4), why_not=needs_linear_weights),
    Variant(name="miss", make=_other("MissConfig", r=4), why_not=needs_linear_weights),
    Variant(name="ia3", make=by_peft(_ia3)),
    Variant(name="ln_tuning", make=by_peft(lambda t: peft.LNTuningConfig(
        task_type="CAUSAL_LM", target_modules=list(t.norms))), why_not=needs_norm),
)  # fmt: skip

VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (*LORA, *TOKENS_AND_HEADS, *INVOKED, *DIALECTS, *CHANGED_BASES, *EXPERTS, *METHODS)
}

SUMS: dict[str, tuple[tuple[str, float], ...]] = {
    "sum_of_two": (("plain", 0.7), ("rslora", 0.3)),
    "sum_of_three": (("plain", 0.5), ("patterns", 1.25), ("layers_to_transform", 1.0)),
    "negative": (("plain", 1.0), ("rslora", -0.5)),
    "weighted": (("plain", 0.5),),
    "weighted_dora": (("dora", 0.5),),
    "sum_with_dora": (("plain", 0.75), ("dora", 0.5)),
}
"""Rows of several adapters: name → (variant, weight), …"""


def why_not(architecture: str, name: str) -> Reason:
    """Why the cell does not exist; None when it does."""
    parts = [part for part, _ in SUMS[name]] if name in SUMS else [name]
    found = (VARIANTS[part].why_not(traits(architecture)) for part in parts)
    return next((reason for reason in found if reason is not None), None)
