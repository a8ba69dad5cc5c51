"""The fields of every method's config, in four kinds: served (they reach the Recipe), inert (known to change nothing at
inference), refused (refusals.py) and, all the rest, unknown.

Tables and the one check over them; the values are read elsewhere. Knows nothing of tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from adapters.config_values import Fields, spelled
from adapters.refusals import REFUSED_FIELDS, Refusal, unknown_field

_ALWAYS_INERT = """
    task_type peft_version auto_mapping base_model_name_or_path revision inference_mode target_modules exclude_modules
    layers_to_transform layers_pattern fan_in_fan_out
"""
"""Training and bookkeeping: keys say what is targeted. `fan_in_fan_out` turns W, not A and B. Some reach the Recipe all
the same, for the report and for refusals."""

_LORA_INERT = """
    lora_dropout megatron_core runtime_config ensure_weight_tying loftq_config eva_config corda_config lora_ga_config
    qalora_group_size invocation_string velora_config monteclora_config lora_B_layout merge_weights lora_dtype
    lorap_lr_ratio lorap_emb_lr
"""
"""Parameters of features that other fields switch, and, the last four, ms-swift's. velora_config and monteclora_config
bring tensors of their own that act in training alone; `megatron_core` names a module that PEFT would import."""

_ADALORA_INERT = "r target_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step"
_ADALORA_REFUSED = """
    use_rslora use_dora lora_bias use_qalora use_bdlora alora_invocation_tokens alora_invocation_string
    target_parameters alpha_pattern velora_config monteclora_config
"""


@dataclass(frozen=True, slots=True)
class FieldTable:
    served: frozenset[str]
    inert: frozenset[str]
    refused: Mapping[str, Refusal] = field(default_factory=dict)
    takes_all: bool = False  # the format's own reader looks at the served ones alone, so the rest is inert


def _of(served: str, inert: str = "", refused: Mapping[str, Refusal] | None = None) -> FieldTable:
    return FieldTable(
        frozenset(["peft_type", *served.split()]), frozenset((_ALWAYS_INERT + inert).split()), refused or {}
    )


def _not_with(method: str, names: str) -> dict[str, Refusal]:
    why = f"{method} has no such thing, so what it would mean is not defined"
    return {name: Refusal(name, why, "Train without it, or train LoRA") for name in names.split()}


_COMMON = "bias modules_to_save"

FIELDS: Mapping[str, FieldTable] = {
    "lora": _of(
        f"""
        {_COMMON} r lora_alpha use_rslora rank_pattern alpha_pattern init_lora_weights use_dora lora_bias
        trainable_token_indices use_qalora use_bdlora alora_invocation_tokens alora_invocation_string target_parameters
        """,
        _LORA_INERT,
        REFUSED_FIELDS,
    ),
    "adalora": _of(
        f"{_COMMON} lora_alpha init_r rank_pattern init_lora_weights trainable_token_indices",
        f"""
        lora_dropout megatron_core runtime_config ensure_weight_tying loftq_config eva_config corda_config
        lora_ga_config qalora_group_size {_ADALORA_INERT}
        """,
        {**REFUSED_FIELDS, **_not_with("AdaLoRA", _ADALORA_REFUSED)},
    ),
    "vera": _of(f"{_COMMON} r save_projection", "projection_prng_key vera_dropout d_initial init_weights"),
    "loha": _of(
        "modules_to_save r alpha rank_pattern alpha_pattern",
        "rank_dropout module_dropout use_effective_conv2d init_weights",
    ),
    "delora": _of(f"{_COMMON} r rank_pattern", "delora_lambda lambda_pattern module_dropout init_weights"),
    "miss": _of(f"{_COMMON} r mini_r init_weights", "miss_dropout"),
    "ia3": _of("modules_to_save feedforward_modules", "init_ia3_weights"),
    "ln_tuning": _of("modules_to_save"),
    "mlx": FieldTable(frozenset(["fine_tune_type", "lora_parameters"]), frozenset(), takes_all=True),
}
"""By method. DeLoRA's lambda and VeRA's d_initial are starting values: the trained ones are tensors."""


def check_fields(method: str, fields: Fields) -> None:
    """Raises AdapterRefused: for a field that is refused first, so that a file with several faults is refused for the
    one that explains it, then for one that is unknown."""
    known = FIELDS[method]
    for name, refusal in known.refused.items():
        if fields.get(name):
            raise refusal.error(feature=spelled(name, fields[name]))
    if known.takes_all:
        return
    for name, value in fields.items():
        if value and name not in known.served and name not in known.inert:
            raise unknown_field(name, value)
