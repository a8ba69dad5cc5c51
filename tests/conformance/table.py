"""The tables of docs/adapters.md that are made from code: `python -m tests.conformance.table` writes them there, and a
test holds them current.
"""

from pathlib import Path

from adapters.errors import RefusalCode as Code
from adapters.refusals import REFUSED_FIELDS, REFUSED_INITS, REFUSED_METHODS
from tests.conformance.cells import ELSEWHERE, REFUSED, cell
from tests.conformance.models import CONFIGS, REFUSED_BASES
from tests.conformance.variants import SUMS, VARIANTS

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"
SERVED, REFUSED_MARK, ABSENT = "●", "✕", "·"

WHAT: dict[str, str] = {
    "plain": "LoRA on all linears",
    "rslora": "`use_rslora`",
    "patterns": "`rank_pattern`, `alpha_pattern`",
    "layers_to_transform": "`layers_to_transform`",
    "regex": "`target_modules` as an expression",
    "all_linear": "`target_modules=all-linear`",
    "gaussian": "`init_lora_weights=gaussian`",
    "orthogonal": "`init_lora_weights=orthogonal`",
    "mica": "`init_lora_weights=mica`",
    "eva": "`init_lora_weights=eva`",
    "dora": "`use_dora`",
    "dora_bias": "`use_dora` with `bias=all`",
    "dora_unsaid": "torchtune's DoRA: magnitudes without `use_dora`",
    "dora_torchtune": "the same on queries and keys, whose magnitudes it leaves in another order",
    "lora_bias": "`lora_bias`",
    "bias_all": "`bias=all`",
    "bias_lora_only": "`bias=lora_only`",
    "bdlora": "`use_bdlora`",
    "qalora": "`use_qalora`",
    "embed": "LoRA on the embedding",
    "embed_dora": "DoRA on the embedding",
    "head": "LoRA on the head",
    "head_dora": "DoRA on the head",
    "embed_head": "LoRA on embedding and head",
    "embed_tied": "the same with `ensure_weight_tying`",
    "mts_embed": "`modules_to_save`: the embedding",
    "mts_head": "`modules_to_save`: the head",
    "mts_both": "`modules_to_save`: both",
    "mts_tied": "`modules_to_save`: the embedding, `ensure_weight_tying`",
    "mts_norm": "`modules_to_save`: norms",
    "tokens": "`trainable_token_indices`",
    "tokens_head": "the same with ids of their own for the head",
    "vocab_grown": "more tokens than the base",
    "vocab_shrunk": "fewer tokens than the base",
    "vocab_grown_tokens": "more tokens, LoRA on embedding and head",
    "alora_never": "aLoRA, not invoked",
    "alora_once": "aLoRA, invoked once",
    "alora_twice": "aLoRA, invoked twice",
    "infix": "keys with the adapter's name inside",
    "sharded": "shards and `adapter_model.safetensors.index.json`",
    "sharded_model_index": "shards and `model.safetensors.index.json`",
    "mixed_dtypes": "float32, bfloat16 and float16 in one file",
    "inner_wrappers": "FSDP's wrappers inside names",
    "unsloth": "Unsloth's config",
    "old_bias_keys": "biases as PEFT before 0.7 named them",
    "mlx": "MLX-LM's layout",
    "headless": "names of the model without its head",
    "text_layout": "names `model.layers…` on a wrapped text model",
    "inner_layout": "names `language_model.model.layers…`",
    "outer_layout": "names `language_model.layers…`",
    "bare_layout": "names `layers…`",
    "split_fused": "q, k, v apart on a fused linear",
    "split_dora": "the same with DoRA, on some parts",
    "split_lora_bias": "the same with `lora_bias`, on some parts",
    "joint": "one `qkv_proj`, `gate_up_proj` on linears that are apart",
    "joint_dora": "the same with `use_dora`",
    "joint_lora_bias": "the same with `lora_bias`",
    "pissa": "PiSSA, not converted",
    "olora": "OLoRA, not converted",
    "kasa": "KaSA",
    "pissa_converted": "PiSSA, converted by PEFT",
    "olora_converted": "OLoRA, converted by PEFT",
    "velora": "VeLoRA",
    "monteclora": "MonteCLoRA",
    "experts": "`target_parameters`: fused experts",
    "experts_rslora": "the same with `use_rslora`",
    "experts_grouped": "the same with B grouped by expert (Unsloth)",
    "experts_down": "one parameter of the experts",
    "experts_each": "a file with every expert apart",
    "experts_each_rslora": "the same with `use_rslora`",
    "experts_shared_outer": "one tensor a projection, its outer half shared by all experts",
    "experts_mlx": "MLX-LM's `switch_mlp`",
    "experts_mlx_old": "the same as before 2025",
    "router": "the router",
    "adalora": "AdaLoRA",
    "vera": "VeRA",
    "loha": "LoHa",
    "delora": "DeLoRA",
    "miss": "MiSS",
    "ia3": "IA³",
    "ln_tuning": "LN tuning",
    "sum_of_two": "0.7 · plain + 0.3 · rsLoRA",
    "sum_of_three": "three adapters, one with weight 1.25",
    "negative": "plain − 0.5 · rsLoRA",
    "weighted": "0.5 · plain",
    "weighted_dora": "0.5 · DoRA",
    "sum_with_dora": "0.75 · plain + 0.5 · DoRA",
}


def table() -> str:
    """Rows are variants, columns architectures; below, why what is refused is."""
    head = ["|  | " + " | ".join(CONFIGS) + " |", "|---|" + ":-:|" * len(CONFIGS)]
    rows = [f"| {WHAT[name]} | " + " | ".join(_mark(a, name) for a in CONFIGS) + " |" for name in (*VARIANTS, *SUMS)]
    legend = [
        "",
        f"{SERVED} served, to PEFT's numbers; {REFUSED_MARK} refused by name; {ABSENT} there is no such adapter.",
        "",
        *(f"- {WHAT[name]}: `{code}`, {why}." for name, (code, why) in REFUSED.items()),
        *(f"- {', '.join(names)}: `{code}`, {why}." for (code, why), names in _elsewhere().items()),
        f"- Bases that are refused: {', '.join(REFUSED_BASES)}, whose attention passes by transformers' interface.",
    ]
    return "\n".join([*head, *rows, *legend])


def _elsewhere() -> dict[tuple[Code, str], list[str]]:
    found: dict[tuple[Code, str], list[str]] = {}
    for (_, name), reason in ELSEWHERE.items():
        if WHAT[name] not in found.setdefault(reason, []):
            found[reason].append(WHAT[name])
    return found


def _mark(architecture: str, name: str) -> str:
    found = cell(architecture, name)
    return ABSENT if found.absent is not None else SERVED if found.is_served else REFUSED_MARK


def refusals() -> str:
    """Fields, starts and methods that are refused for good, those of one reason in one row."""
    rows: dict[tuple[str, str], list[str]] = {}
    for refusal in (*REFUSED_FIELDS.values(), *REFUSED_INITS.values(), *REFUSED_METHODS.values()):
        rows.setdefault((refusal.why, refusal.fix), []).append(f"`{refusal.feature}`")
    lines = [f"| {', '.join(features)} | {why} | {fix} |" for (why, fix), features in rows.items()]
    return "\n".join(["| Feature | Why | Fix |", "|---|---|---|", *lines])


def page() -> str:
    """The page with both tables in their places."""
    text = PAGE.read_text(encoding="utf-8")
    for name, made in (("conformance", table()), ("refusals", refusals())):
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{made}\n{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
