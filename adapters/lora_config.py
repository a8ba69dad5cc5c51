"""adapter_config.json → LoRAConfig: the fields that change the mathematics, or a refusal that names the field.

Every field is one of four kinds: served (read here), inert (known to change nothing at inference), unserved (known to
change the mathematics: refused when set) and unknown (refused when set, because silence would be a guess). No regular
expression from the file is run, nothing is imported, and target_modules is not resolved: the keys of the weights say
what is targeted. Knows nothing of tensors or of the base.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from adapters.config_values import CONFIG_NAME as CONFIG_NAME
from adapters.config_values import Fields, declared, flag, listed, number, rank, spelled, table, unsupported
from adapters.errors import AdapterRefused, RefusalCode
from adapters.name_patterns import PatternTable
from adapters.untrusted_json import parse_object, shown

MAX_CONFIG_BYTES = 1024 * 1024
MAX_SCALE = 1024.0
"""|alpha/r| past this is a broken file: published adapters stay under 128."""

SERVED_FIELDS = frozenset("peft_type r lora_alpha use_rslora rank_pattern alpha_pattern bias init_lora_weights".split())

INERT_FIELDS = frozenset(
    """
    task_type peft_version auto_mapping base_model_name_or_path revision inference_mode lora_dropout target_modules
    exclude_modules layers_to_transform layers_pattern fan_in_fan_out megatron_core runtime_config ensure_weight_tying
    loftq_config eva_config corda_config lora_ga_config qalora_group_size lora_B_layout merge_weights
    lora_dtype lorap_lr_ratio lorap_emb_lr
    """.split()
)
"""Training, bookkeeping, or the parameters of a feature whose own switch is refused when set. `fan_in_fan_out` turns
W, not A and B; `megatron_core` names a module that PEFT would import and we do not; the last three are ms-swift's."""

_RETRAIN = "Train without it, or merge the adapter into a base of its own"
UNSERVED_FIELDS: Mapping[str, tuple[str, str]] = {
    "use_dora": ("DoRA rescales every output by a learned magnitude", "Train with use_dora=False"),
    "lora_bias": ("LoRA's B carries a bias of its own", "Train with lora_bias=False"),
    "modules_to_save": (
        "whole modules are replaced, not adapted",
        "Train with modules_to_save=None; LoRA on the layers between stays served",
    ),
    "trainable_token_indices": ("rows of the embedding are replaced", "Train without trainable_token_indices"),
    "target_parameters": ("LoRA sits on bare parameters, such as fused experts", "Target linear modules only"),
    "alora_invocation_tokens": ("activated LoRA starts at a token, not at the beginning", _RETRAIN),
    "alora_invocation_string": ("activated LoRA starts at a token, not at the beginning", _RETRAIN),
    "invocation_string": ("activated LoRA starts at a token, not at the beginning", _RETRAIN),
    "layer_replication": ("the adapter changes the depth of the base", "Build the deeper base and serve that"),
    "use_qalora": ("QALoRA pools the input in groups", _RETRAIN),
    "use_bdlora": ("block-diagonal LoRA stores A or B in blocks", _RETRAIN),
    "arrow_config": ("Arrow routes each token among other adapters", "Serve the adapters it routes to by name"),
    "kasa_config": ("KaSA takes singular components away from the base", _RETRAIN),
    "velora_config": ("VeLoRA adds tensors of its own", _RETRAIN),
    "monteclora_config": ("MonteCLoRA adds tensors of its own", _RETRAIN),
    "megatron_config": ("Megatron's parallel linears shard A and B", "Export to the plain PEFT layout"),
    "enable_lora": ("loralib's merged linear adapts slices of a fused projection", _RETRAIN),
}

_REPLAY = "Save again with path_initial_model_for_weight_conversion, which makes a plain adapter of twice the rank"
_PLAIN_INITS = (None, True, False, "gaussian", "orthogonal", "mica", "eva")
_CHANGED_BASE = {
    "pissa": "the base was replaced by what its first singular components leave",
    "olora": "the base was replaced by what its QR factors leave",
    "corda": "the base was changed by a decomposition that needs the training data",
    "loftq": "the adapter corrects a quantised base that is not the one served",
    "lora_ga": "the base was changed by a decomposition that needs gradients",
    "pissa_niter": "the base was changed by a random decomposition that cannot be replayed",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRAConfig:
    """What the file says about scale: s = lora_alpha / r, or lora_alpha / √r with use_rslora, per module."""

    r: int
    lora_alpha: float
    use_rslora: bool = False
    rank_pattern: PatternTable[int] = PatternTable()
    alpha_pattern: PatternTable[float] = PatternTable()
    target_modules: tuple[str, ...] = ()  # as listed; () when absent or an expression
    base_model: str | None = None  # what the file declares, made printable; a claim, not a fact

    @classmethod
    def parse(cls, data: bytes) -> "LoRAConfig":
        """Raises AdapterRefused: adapter_unsupported, adapter_unknown_field, adapter_too_large or adapter_corrupt."""
        if len(data) > MAX_CONFIG_BYTES:
            why = f"{CONFIG_NAME} has over {MAX_CONFIG_BYTES} bytes"
            raise AdapterRefused(RefusalCode.TOO_LARGE, why, "Save the adapter again with PEFT", feature=CONFIG_NAME)
        fields = parse_object(data, what=CONFIG_NAME)
        _check_kind(fields)
        _check_features(fields)
        return cls.of(fields)

    @classmethod
    def of(cls, fields: Fields) -> "LoRAConfig":
        """The scales of a config whose other fields somebody else has judged."""
        return cls(
            r=rank("r", fields.get("r")),
            lora_alpha=number("lora_alpha", fields.get("lora_alpha")),
            use_rslora=flag("use_rslora", fields.get("use_rslora")),
            rank_pattern=PatternTable.parse(
                {key: rank(f"rank_pattern[{shown(key)}]", value) for key, value in table(fields, "rank_pattern")},
                field="rank_pattern",
            ),
            alpha_pattern=PatternTable.parse(
                {key: number(f"alpha_pattern[{shown(key)}]", value) for key, value in table(fields, "alpha_pattern")},
                field="alpha_pattern",
            ),
            target_modules=listed(fields.get("target_modules")),
            base_model=declared(fields.get("base_model_name_or_path")),
        )

    @property
    def features(self) -> tuple[str, ...]:
        """What goes beyond one rank and one alpha for all modules."""
        found = {
            "rslora": self.use_rslora,
            "rank_pattern": bool(self.rank_pattern.entries),
            "alpha_pattern": bool(self.alpha_pattern.entries),
        }
        return tuple(name for name, is_found in found.items() if is_found)

    def rank_of(self, module: str) -> int:
        return self.rank_pattern.lookup(module, self.r)

    def scale_of(self, module: str) -> float:
        """s of a module, by the name the file calls it. Raises AdapterRefused when |s| is past MAX_SCALE."""
        lora_rank, alpha = self.rank_of(module), self.alpha_pattern.lookup(module, self.lora_alpha)
        scale = alpha / (math.sqrt(lora_rank) if self.use_rslora else lora_rank)
        if abs(scale) > MAX_SCALE:
            raise AdapterRefused(
                RefusalCode.UNSUPPORTED,
                f"the scale of {shown(module)} is {scale:g}, past ±{MAX_SCALE:g}",
                "Check lora_alpha, r and use_rslora",
                feature=f"lora_alpha={alpha:g}",
            )
        return scale

    def canonical(self) -> bytes:
        """The fields that change the mathematics, one spelling for one meaning: the config's part of the version."""
        fields = {
            "alpha_pattern": self.alpha_pattern.to_json(float),
            "lora_alpha": float(self.lora_alpha),
            "r": self.r,
            "rank_pattern": self.rank_pattern.to_json(int),
            "use_rslora": self.use_rslora,
        }
        return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii")


def _check_kind(fields: Fields) -> None:
    peft_type = fields.get("peft_type")
    if peft_type == "LORA":
        return
    if "fine_tune_type" in fields or "lora_parameters" in fields:
        raise unsupported("format=mlx", "this is an MLX-LM adapter; its scale and layout differ", "Export it to PEFT")
    if peft_type is None:
        raise unsupported("peft_type", f"{CONFIG_NAME} does not say peft_type=LORA", "Save the adapter with PEFT")
    fix = "Convert it to LoRA with PEFT, or train LoRA"
    raise unsupported(spelled("peft_type", peft_type), "only LoRA is served", fix)


def _check_features(fields: Fields) -> None:
    """Known names first, so that a file with several faults is refused for the one that explains it."""
    if fields.get("bias") not in (None, "none", False):
        raise unsupported(spelled("bias", fields["bias"]), "biases of the base are replaced", "Train with bias='none'")
    _check_init(fields.get("init_lora_weights"))
    for name, (why, fix) in UNSERVED_FIELDS.items():
        if fields.get(name):
            raise unsupported(spelled(name, fields[name]), why, fix)
    for name, value in fields.items():
        if value and not (name in SERVED_FIELDS or name in INERT_FIELDS or name in UNSERVED_FIELDS):
            raise AdapterRefused(
                RefusalCode.UNKNOWN_FIELD,
                "this server does not know the field, so it cannot know that ignoring it is right",
                f"Remove it from {CONFIG_NAME} if it changes nothing at inference",
                feature=spelled(name, value),
            )


def _check_init(value: object) -> None:
    if any(value is plain or (isinstance(value, str) and value == plain) for plain in _PLAIN_INITS):
        return
    feature = spelled("init_lora_weights", value)
    kind = "pissa_niter" if isinstance(value, str) and value.startswith("pissa_niter_") else value
    why = _CHANGED_BASE.get(kind) if isinstance(kind, str) else None
    if why is None:
        raise unsupported(feature, "this way of starting may have changed the base", _REPLAY)
    raise unsupported(feature, why, _REPLAY)
