"""What is refused by name: every feature of adapters' files that is known and not served, why, and the way out.

The one table of it: readers raise from here, and the page that users read is made from it. Knows names and texts,
nothing of how they are found in a file.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from adapters.errors import AdapterRefused, RefusalCode
from adapters.untrusted_json import shown


@dataclass(frozen=True, slots=True)
class Refusal:
    """`feature` is what the refusal names, unless the reader knows more than the table, such as the field's value."""

    feature: str
    why: str
    fix: str
    code: RefusalCode = RefusalCode.UNSUPPORTED

    def error(self, *, feature: str | None = None, tensor: str | None = None, why: str | None = None) -> AdapterRefused:
        return AdapterRefused(self.code, why or self.why, self.fix, feature=feature or self.feature, tensor=tensor)


_RETRAIN = "Train without it, or merge the adapter into a base of its own"
_CONVERT = "Make a plain adapter of twice the rank: `loramux convert FOLDER OUT --model BASE`"
_REPLAY = "Save again with path_initial_model_for_weight_conversion, which makes a plain adapter of twice the rank"
_TO_LORA = "Convert it with PEFT's convert_to_lora, which is exact or states its error, and load that"
_MERGE = "Train LoRA, or merge it into the base and serve that as a base of its own"

# --- fields of LoRA's config that are refused when they are set

REFUSED_FIELDS: Mapping[str, Refusal] = {
    refusal.feature: refusal
    for refusal in (
        Refusal("kasa_config", "KaSA took the smallest singular components away from the base", _CONVERT),
        Refusal(
            "layer_replication", "the adapter changes the depth of the base", "Build the deeper base and serve that"
        ),
        Refusal(
            "arrow_config", "Arrow routes each token among other adapters", "Serve the adapters it routes to by name"
        ),
        Refusal(
            "megatron_config",
            "Megatron's parallel linears shard A and B",
            "Export to the plain PEFT layout and load that",
        ),
        Refusal(
            "enable_lora",
            "loralib's merged linear adapts slices of a fused projection",
            "Convert it: `loramux convert FOLDER OUT --alpha ALPHA --enable-lora LIST`",
        ),
    )
}

PLAIN_INITS = (None, True, False, "gaussian", "orthogonal", "mica", "eva")
"""Starts that leave the base as it is; the served adapter does not depend on them."""

REFUSED_INITS: Mapping[str, Refusal] = {
    "pissa": Refusal(
        "init_lora_weights=pissa", "the base was replaced by what its first singular components leave", _CONVERT
    ),
    "olora": Refusal("init_lora_weights=olora", "the base was replaced by what its QR factors leave", _CONVERT),
    "pissa_niter": Refusal(
        "init_lora_weights=pissa_niter",
        "the base was changed by a random decomposition that cannot be replayed",
        _REPLAY,
    ),
    "corda": Refusal(
        "init_lora_weights=corda", "the base was changed by a decomposition that needs the training data", _REPLAY
    ),
    "loftq": Refusal(
        "init_lora_weights=loftq",
        "the adapter corrects a quantised base that is not the one served",
        "Serve the base that was trained on, dequantised, and set init_lora_weights to true",
    ),
    "lora_ga": Refusal(
        "init_lora_weights=lora_ga", "the base was changed by a decomposition that needs gradients", _REPLAY
    ),
}
UNKNOWN_INIT = Refusal("init_lora_weights", "this way of starting may have changed the base", _REPLAY)

VARIANTS_COMBINED = Refusal(
    "variants", "PEFT has no combination of these variants, so what it means is not defined", "Keep one of them"
)
INVOCATION_STRING = Refusal(
    "alora_invocation_string",
    "activated LoRA starts at tokens, and how a string becomes tokens is not in the file",
    "Write the ids into alora_invocation_tokens",
)
ACTIVATED_MORE = Refusal(
    "alora_invocation_tokens",
    "the adapter is activated at tokens of the prompt and changes more than pairs of linears, which acts before them",
    "Train activated LoRA on linear modules alone",
)
TOKEN_LOGITS = Refusal(
    "task_type",
    "the adapter brings a head that classifies, and this server computes logits of tokens",
    "Train CAUSAL_LM",
)
FUSED_EXPERTS = Refusal(
    "target_parameters",
    "the pair is on a bare parameter that is neither fused experts' nor a router's, or has more to it than A and B",
    "Target experts, routers and linear modules only, with plain LoRA",
)

# --- other methods than LoRA, by peft_type


def _methods(kind: str, fix: str, names: str) -> dict[str, Refusal]:
    return {name: Refusal(f"peft_type={name}", kind, fix) for name in names.split()}


REFUSED_METHODS: Mapping[str, Refusal] = {
    **_methods("it routes tokens among adapters", "Serve the adapters it routes to by name", "XLORA POLY"),
    **_methods(
        "its change of a weight has full rank, or depends on the weight",
        _MERGE,
        "HIRA FOURIERFT RANDLORA C3A SHIRA WAVEFT OSF LOKR GLORA BEFT LILY FROD PVERA ADAMSS PEANUT SHADOW SUPERTUNING "
        "DEFT ROAD",
    ),
    **_methods("it turns the inputs of the base's linears", _MERGE, "OFT BOFT HRA"),
    **_methods(
        "it puts learned vectors before the prompt or into its keys and values",
        "Train LoRA",
        "PROMPT_TUNING P_TUNING PREFIX_TUNING MULTITASK_PROMPT_TUNING ADAPTION_PROMPT CPT CARTRIDGE",
    ),
    **_methods("it is stored in a form that only PEFT expands", _TO_LORA, "GRALORA TINYLORA VBLORA UNILORA PSOFT"),
    **_methods(
        "it trains rows of the embedding and no LoRA",
        "Train LoRA with trainable_token_indices",
        "TRAINABLE_TOKENS",
    ),
    **_methods("its layout changed between versions of PEFT", "Save it as MiSS with a newer PEFT", "BONE"),
}
NO_METHOD = Refusal("peft_type", "the config does not say which method it is of", "Save the adapter with PEFT")
UNKNOWN_METHOD = Refusal(
    "peft_type", "this server does not know the method", "Convert it to LoRA with PEFT, or train LoRA"
)

# --- parts of imports

MISS_BAT = Refusal("init_weights=bat", "MiSS's bat mode depends on the base's weights", _TO_LORA)
VERA_NOT_STORED = Refusal(
    "save_projection=false",
    "the shared projections are not in the file, and would have to be drawn again by PEFT's generator",
    "Save again with save_projection=True",
)
CONVOLUTION = Refusal(
    "target_modules", "the tensor belongs to a convolution", "Leave convolutions out of target_modules"
)
MLX_FULL = Refusal("fine_tune_type=full", "MLX-LM replaced whole weights of the base", "Serve it as a base of its own")
MLX_UNKNOWN = Refusal(
    "fine_tune_type", "MLX-LM trains lora or dora; this is neither", "Train with --fine-tune-type lora"
)
MLX_ALPHA = Refusal(
    "lora_parameters.alpha",
    "some versions of mlx-lm multiply the scale by alpha/rank and others pass alpha over",
    "Remove alpha from lora_parameters, and write the scale that was trained with into scale",
    RefusalCode.AMBIGUOUS_LAYOUT,
)
MLX_EMBEDDING_DORA = Refusal(
    "fine_tune_type=dora",
    "MLX-LM's DoRA rescales every row of an embedding, not its columns",
    "Leave embeddings out of keys",
)
MLX_EXPERTS = Refusal(
    "format=mlx",
    "the tensor has three dimensions and is no pair of gate_proj, up_proj or down_proj of switch_mlp",
    "Leave the module out of keys, or export it to PEFT",
)
MLX_QUANTISED = Refusal("format=mlx", "the tensor belongs to a quantised weight", "Save the adapter without --quantize")

# --- contradictions

TORCHTUNE_MAGNITUDE = Refusal(
    "torchtune_magnitude",
    "the file has DoRA magnitudes and no use_dora, as torchtune writes it; torchtune reorders the rows of B of queries "
    "and keys and not their magnitudes, and on this base, or from this writer, which row a magnitude is for is unknown",
    "Train with PEFT, or without q_proj and k_proj, or serve it on the Llama or Mistral it was trained on",
    RefusalCode.AMBIGUOUS_LAYOUT,
)
DORA_DENIED = Refusal(
    "use_dora=False",
    "the file has DoRA magnitudes, and the config says that it is not DoRA",
    "Set use_dora to true if it was trained with DoRA, or remove the magnitudes",
    RefusalCode.AMBIGUOUS_LAYOUT,
)
LORA_BIAS_DENIED = Refusal(
    "lora_bias=False",
    "the file has a bias of B, and the config does not say lora_bias",
    "Set lora_bias to true if it was trained so, or remove the tensor",
    RefusalCode.AMBIGUOUS_LAYOUT,
)

EXPERT_LAYOUT = Refusal(
    "experts",
    "how the pairs of fused experts are stored is told neither by names and shapes nor by the config",
    "Write what the trainer did into adapter_config.json: lora_B_layout (rank_major or grouped_by_expert), "
    "peft_version, target_parameters",
    RefusalCode.AMBIGUOUS_LAYOUT,
)

EXPERT_B_LAYOUT = Refusal(
    "lora_B_layout",
    "Unsloth wrote B grouped by expert until September 2026 and rank-major since, and no mark says which",
    "Load it with moe_lora_b_layout=rank_major or grouped_by_expert (`--moe-lora-b-layout`), as the trainer did, or "
    "write that into adapter_config.json as lora_B_layout",
    RefusalCode.AMBIGUOUS_LAYOUT,
)

# --- names of tensors, by one of their parts or by how a part begins ("…_")

_IMAGE = ("format=kohya", "this is a LoRA for an image model", "Serve it where its base is served")
_NATIVE = "Export it to PEFT's layout with the trainer that wrote it, and load that"
REFUSED_PARTS: Mapping[str, Refusal] = {
    "lora_diag": REFUSED_FIELDS["kasa_config"],
    "lora_unet_": Refusal(*_IMAGE),
    "lora_te_": Refusal(*_IMAGE),
    "lora_te1_": Refusal(*_IMAGE),
    "lora_te2_": Refusal(*_IMAGE),
    "lora_transformer_": Refusal(*_IMAGE),
    "lora_down": Refusal(*_IMAGE),
    "lora_up": Refusal(*_IMAGE),
    "unet": Refusal("format=diffusers", *_IMAGE[1:]),
    "lora_a": Refusal("format=mlx or torchtune", "lower-case lora_a is another layout and scale", _NATIVE),
    "lora_b": Refusal("format=mlx or torchtune", "lower-case lora_b is another layout and scale", _NATIVE),
}
LORALIB = Refusal(
    "format=loralib",
    "A or B has no .weight, as loralib stores it, and the scale of a loralib file is not in the file",
    "Convert it: `loramux convert FOLDER OUT --alpha ALPHA`",
)


def refused_part(key: str) -> Refusal | None:
    """The refusal that a tensor's name asks for, if any of its parts is in the table."""
    for part in key.split("."):
        for mark, refusal in REFUSED_PARTS.items():
            if part == mark or (mark.endswith("_") and part.startswith(mark)):
                return refusal
    return None


def unknown_field(name: str, value: object) -> AdapterRefused:
    return AdapterRefused(
        RefusalCode.UNKNOWN_FIELD,
        "this server does not know the field, so it cannot know that ignoring it is right",
        "Remove it from adapter_config.json if it changes nothing at inference",
        feature=f"{shown(name, 80)}={shown(value)}",
    )


def unmatched(
    key: str, why: str = "the name is of no form that this method writes, and no tensor may be left over"
) -> AdapterRefused:
    fix = "Save it again with PEFT's save_pretrained, or leave the tensor out (`ignore`) if it changes nothing"
    return AdapterRefused(RefusalCode.KEY_UNMATCHED, why, fix, tensor=key)


def no_fused_experts(option: str) -> AdapterRefused:
    why = "the option says how B of fused experts is stored, and the files hold no pair of fused experts"
    return AdapterRefused(RefusalCode.KEY_UNMATCHED, why, "Load it without the option", feature=option)


def incomplete(key: str, why: str, *, feature: str | None = None) -> AdapterRefused:
    fix = "The file is incomplete: save the adapter again"
    return AdapterRefused(RefusalCode.INCOMPLETE_PAIR, why, fix, feature=feature, tensor=key)


def shape_mismatch(key: str, why: str, *, feature: str | None = None) -> AdapterRefused:
    fix = "Correct adapter_config.json, or save the adapter again"
    return AdapterRefused(RefusalCode.SHAPE_MISMATCH, why, fix, feature=feature, tensor=key)


def unsupported_scale(scale: float, limit: float, feature: str) -> AdapterRefused:
    why = f"the scale is {scale:g}, past ±{limit:g}"
    return AdapterRefused(RefusalCode.UNSUPPORTED, why, "Check the numbers that it is made of", feature=feature)
