"""adapter_config.json → Recipe: what the config of any served method says beyond the tensors, or a refusal by name.

A Recipe is frozen, hashable and made of the file's own names; two configs with one meaning have one canonical form. No
expression from the file is run and nothing is imported. Knows nothing of tensors, files or bases.
"""

import json
from dataclasses import dataclass

from adapters.config_fields import check_fields
from adapters.config_values import Fields, bad_value, declared, flag, ids, names, spelled, table
from adapters.errors import AdapterRefused, RefusalCode
from adapters.lora_config import CONFIG_NAME, MAX_CONFIG_BYTES, LoRAConfig
from adapters.method_fields import BlockDiagonal, Value, block_diagonal, method_fields
from adapters.refusals import (
    INVOCATION_STRING,
    NO_METHOD,
    PLAIN_INITS,
    REFUSED_INITS,
    REFUSED_METHODS,
    UNKNOWN_INIT,
    UNKNOWN_METHOD,
    VARIANTS_COMBINED,
)
from adapters.untrusted_json import parse_object

METHODS = {
    "LORA": "lora",
    "ADALORA": "adalora",
    "VERA": "vera",
    "LOHA": "loha",
    "DELORA": "delora",
    "MISS": "miss",
    "IA3": "ia3",
    "LN_TUNING": "ln_tuning",
}
"""peft_type → our name of the method; MLX-LM's folders say none and are known by fields of their own."""

_VARIANTS = "use_dora use_qalora use_bdlora alora_invocation_tokens velora_config monteclora_config".split()


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    method: str = "lora"
    scales: LoRAConfig  # r, alpha and their patterns; of methods without them only what they declare
    numbers: tuple[tuple[str, Value], ...] = ()  # what else the method's formula takes, by name
    use_dora: bool | None = None  # None: the file does not say
    lora_bias: bool = False
    bias: str = "none"
    modules_to_save: tuple[str, ...] = ()
    token_ids: tuple[
        tuple[str, tuple[int, ...]], ...
    ] = ()  # by module as the config calls it; "" = the input embedding
    invocation_tokens: tuple[int, ...] = ()
    bdlora: BlockDiagonal | None = None
    qalora_group: int | None = None
    training_only: frozenset[str] = frozenset()  # fields whose tensors act in training alone
    target_parameters: tuple[str, ...] = ()
    expert_b_layout: str | None = None  # lora_B_layout: rank_major or grouped_by_expert
    unsloth_fixed: bool = False
    peft_version: str | None = None
    task_type: str | None = None

    def number(self, name: str) -> Value:
        return dict(self.numbers)[name]

    def canonical(self) -> bytes:
        """What changes the mathematics, one spelling for one meaning: the config's part of an adapter's version.

        Of a plain adapter LoRAConfig's own five fields; other keys stand in it only where they differ from plain.
        """
        fields: dict[str, object] = json.loads(self.scales.canonical())
        more: dict[str, object] = {
            "method": "" if self.method == "lora" else self.method,
            "numbers": dict(self.numbers),
            "use_dora": bool(self.use_dora),
            "lora_bias": self.lora_bias,
            "bias": "" if self.bias == "none" else self.bias,
            "token_ids": self.token_ids,
            "invocation_tokens": self.invocation_tokens,
            "bdlora": self.bdlora and self.bdlora.to_json(),
            "qalora_group": self.qalora_group,
            "target_parameters": sorted(self.target_parameters),
            "expert_b_layout": self.expert_b_layout,
            "peft_version": self.peft_version if self.target_parameters else None,
        }
        fields |= {name: value for name, value in more.items() if value}
        return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii")


def read_recipe(data: bytes) -> Recipe:
    """Raises AdapterRefused: adapter_unsupported, adapter_unknown_field, adapter_ambiguous_layout, adapter_too_large or
    adapter_corrupt, each naming the field."""
    if len(data) > MAX_CONFIG_BYTES:
        why = f"{CONFIG_NAME} has over {MAX_CONFIG_BYTES} bytes"
        raise AdapterRefused(RefusalCode.TOO_LARGE, why, "Save the adapter again with PEFT", feature=CONFIG_NAME)
    fields = parse_object(data, what=CONFIG_NAME)
    method = _method_of(fields)
    if method == "lora":
        _check_init(fields.get("init_lora_weights"))
    check_fields(method, fields)
    return _lora_recipe(fields) if method == "lora" else _other_recipe(method, fields)


def _method_of(fields: Fields) -> str:
    peft_type = fields.get("peft_type")
    if peft_type is None:
        if "fine_tune_type" in fields or "lora_parameters" in fields:
            return "mlx"
        raise NO_METHOD.error()
    method = METHODS.get(peft_type) if isinstance(peft_type, str) else None
    if method is None:
        refusal = REFUSED_METHODS.get(peft_type, UNKNOWN_METHOD) if isinstance(peft_type, str) else UNKNOWN_METHOD
        raise refusal.error(feature=spelled("peft_type", peft_type))
    return method


def _check_init(value: object) -> None:
    if any(value is plain or (isinstance(value, str) and value == plain) for plain in PLAIN_INITS):
        return
    kind = "pissa_niter" if isinstance(value, str) and value.startswith("pissa_niter_") else value
    refusal = REFUSED_INITS.get(kind, UNKNOWN_INIT) if isinstance(kind, str) else UNKNOWN_INIT
    raise refusal.error(feature=spelled("init_lora_weights", value))


def _lora_recipe(fields: Fields) -> Recipe:
    _check_variants(fields)
    mapping = fields.get("auto_mapping")
    return Recipe(
        scales=LoRAConfig.of(fields),
        use_dora=None if fields.get("use_dora") is None else flag("use_dora", fields["use_dora"]),
        lora_bias=flag("lora_bias", fields.get("lora_bias")),
        bias=_bias(fields, "lora"),
        modules_to_save=names("modules_to_save", fields.get("modules_to_save")),
        token_ids=_token_ids(fields),
        invocation_tokens=_invocation_tokens(fields),
        bdlora=block_diagonal(fields.get("use_bdlora")),
        qalora_group=_qalora_group(fields),
        training_only=frozenset(name for name in ("velora_config", "monteclora_config") if fields.get(name)),
        target_parameters=names("target_parameters", fields.get("target_parameters")),
        expert_b_layout=_expert_b_layout(fields),
        unsloth_fixed=isinstance(mapping, dict) and bool(mapping.get("unsloth_fixed")),
        peft_version=declared(fields.get("peft_version")),
        task_type=declared(fields.get("task_type")),
    )


def _other_recipe(method: str, fields: Fields) -> Recipe:
    scales, numbers = method_fields(method, fields)
    return Recipe(
        method=method,
        scales=scales,
        numbers=tuple(sorted(numbers.items())),
        bias=_bias(fields, method) if method != "mlx" else "none",
        modules_to_save=names("modules_to_save", fields.get("modules_to_save")) if method != "mlx" else (),
        token_ids=_token_ids(fields) if method == "adalora" else (),
        task_type=declared(fields.get("task_type")),
    )


def _check_variants(fields: Fields) -> None:
    """PEFT refuses two of them at once; and a bias of B beside DoRA."""
    found = [name for name in _VARIANTS if fields.get(name)]
    if fields.get("init_lora_weights") == "mica":
        found.append("init_lora_weights=mica")
    if fields.get("use_dora") and fields.get("lora_bias"):
        found.append("lora_bias")
    if len(found) > 1:
        raise VARIANTS_COMBINED.error(feature=" and ".join(found))


def _bias(fields: Fields, method: str) -> str:
    value = fields.get("bias") or "none"
    if value not in ("none", "all", f"{method}_only", "lora_only"):
        raise bad_value("bias", value, f"none, all or {method}_only")
    return str(value)


def _token_ids(fields: Fields) -> tuple[tuple[str, tuple[int, ...]], ...]:
    name = "trainable_token_indices"
    value = fields.get(name)
    if isinstance(value, dict):
        names(name, [*value])
        return tuple((module, ids(f"{name}[{module!r}]", listed_ids)) for module, listed_ids in table(fields, name))
    return (("", ids(name, value)),) if value else ()


def _invocation_tokens(fields: Fields) -> tuple[int, ...]:
    """In order, and one may stand twice: they are a text."""
    value = fields.get("alora_invocation_tokens")
    if not value:
        for name in ("alora_invocation_string", "invocation_string"):
            if fields.get(name):
                raise INVOCATION_STRING.error(feature=spelled(name, fields[name]))
        return ()
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item < 1 << 31 for item in value):
        raise bad_value("alora_invocation_tokens", value, "a list of token ids")
    return tuple(value)


def _qalora_group(fields: Fields) -> int | None:
    if not flag("use_qalora", fields.get("use_qalora")):
        return None
    value = fields.get("qalora_group_size", 16)
    if type(value) is not int or not 1 <= value <= 1 << 16:
        raise bad_value("qalora_group_size", value, "a positive integer")
    return value


def _expert_b_layout(fields: Fields) -> str | None:
    value = fields.get("lora_B_layout")
    if value not in (None, "rank_major", "grouped_by_expert"):
        raise bad_value("lora_B_layout", value, "rank_major or grouped_by_expert")
    return value if isinstance(value, str) else None
