"""What each method's formula takes from its config beside LoRA's r and alpha, and what MLX-LM's config says.

From fields that config_fields.py has judged to scales and a few named numbers. Knows nothing of tensors.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from adapters.config_values import Fields, bad_value, declared, flag, listed, names, number, rank, spelled, table
from adapters.lora_config import LoRAConfig
from adapters.refusals import MISS_BAT, MLX_ALPHA, MLX_FULL, MLX_UNKNOWN, VERA_NOT_STORED, unknown_field
from adapters.untrusted_json import shown

Value = int | float | str | bool | tuple[str, ...] | tuple[tuple[str, int], ...]
Read = tuple[LoRAConfig, Mapping[str, Value]]


@dataclass(frozen=True, slots=True)
class BlockDiagonal:
    """BD-LoRA: A of modules whose last name part contains one of `a` is stored in blocks, B of those of `b`."""

    a: tuple[str, ...]
    b: tuple[str, ...]
    num_blocks: int
    is_strict: bool  # a module of neither is an error

    def to_json(self) -> list[object]:
        return [self.a, self.b, self.num_blocks]


def block_diagonal(value: object) -> BlockDiagonal | None:
    if not value:
        return None
    if not isinstance(value, dict):
        raise bad_value("use_bdlora", value, "a table")
    for name in value:
        if name not in ("target_modules_bd_a", "target_modules_bd_b", "nblocks", "match_strict"):
            raise unknown_field(f"use_bdlora.{name}", value[name])
    return BlockDiagonal(
        names("use_bdlora.target_modules_bd_a", value.get("target_modules_bd_a")),
        names("use_bdlora.target_modules_bd_b", value.get("target_modules_bd_b")),
        rank("use_bdlora.nblocks", value.get("nblocks")),
        flag("use_bdlora.match_strict", value.get("match_strict", True)),
    )


def method_fields(method: str, fields: Fields) -> Read:
    """The scales, and the numbers that the method's reader asks for. Raises AdapterRefused naming the field."""
    return _READ[method](fields)


def _adalora(fields: Fields) -> Read:
    """rank_pattern lists, for each lora_E, which of the init_r first ranks were kept."""
    kept = []
    for name, mask in table(fields, "rank_pattern"):
        if not isinstance(mask, list) or not all(isinstance(item, bool) for item in mask):
            raise bad_value(f"rank_pattern[{shown(name)}]", mask, "a list of true and false")
        kept.append((name, sum(mask)))
    numbers: dict[str, Value] = {
        "alpha": number("lora_alpha", fields.get("lora_alpha")),
        "init_r": rank("init_r", fields.get("init_r")),
        "kept": tuple(sorted(kept)),
    }
    return _scales(fields, r=rank("init_r", fields.get("init_r"))), numbers


def _vera(fields: Fields) -> Read:
    if fields.get("save_projection") is False:
        raise VERA_NOT_STORED.error()
    return _scales(fields, r=rank("r", fields.get("r"))), {}


def _loha(fields: Fields) -> Read:
    return LoRAConfig.of({**fields, "lora_alpha": number("alpha", fields.get("alpha"))}), {}


def _delora(fields: Fields) -> Read:
    return LoRAConfig.of({**fields, "lora_alpha": 1.0}), {}


def _miss(fields: Fields) -> Read:
    init = fields.get("init_weights", True)
    if init == "bat":
        raise MISS_BAT.error()
    if not (init is None or isinstance(init, bool) or init == "mini"):
        raise bad_value("init_weights", init, "true, false or mini")
    mini_r = rank("mini_r", fields.get("mini_r")) if init == "mini" else 0
    return _scales(fields, r=rank("r", fields.get("r"))), {"mini_r": mini_r}


def _ia3(fields: Fields) -> Read:
    """An expression of feed-forward modules is not run: the shapes of the tensors say the same."""
    value = fields.get("feedforward_modules")
    return _scales(fields, r=0), {"feedforward": () if isinstance(value, str) else names("feedforward_modules", value)}


def _ln_tuning(fields: Fields) -> Read:
    return _scales(fields, r=0), {}


def _mlx(fields: Fields) -> Read:
    """MLX-LM multiplies by `scale` itself, whatever the rank. Its loader reads these fields and no others."""
    kind = fields.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise (MLX_FULL if kind == "full" else MLX_UNKNOWN).error(feature=spelled("fine_tune_type", kind))
    parameters = fields.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise bad_value("lora_parameters", parameters, "a table with rank and scale")
    for name, value in parameters.items():
        if value and name not in ("rank", "scale", "dropout", "keys", "alpha"):
            raise unknown_field(f"lora_parameters.{name}", value)
    r = rank("lora_parameters.rank", parameters.get("rank"))
    if parameters.get("alpha") not in (None, r):
        raise MLX_ALPHA.error(feature=spelled("lora_parameters.alpha", parameters["alpha"]))
    scale = number("lora_parameters.scale", parameters.get("scale"))
    base = declared(fields.get("model"))
    return LoRAConfig(r=r, lora_alpha=scale * r, base_model=base), {"scale": scale, "is_dora": kind == "dora"}


def _scales(fields: Fields, *, r: int) -> LoRAConfig:
    """Of methods whose tensors carry their strength: r as the file says it, s = 1."""
    return LoRAConfig(
        r=r,
        lora_alpha=float(r),
        target_modules=listed(fields.get("target_modules")),
        base_model=declared(fields.get("base_model_name_or_path")),
    )


_READ: Mapping[str, Callable[[Fields], Read]] = {
    "adalora": _adalora,
    "vera": _vera,
    "loha": _loha,
    "delora": _delora,
    "miss": _miss,
    "ia3": _ia3,
    "ln_tuning": _ln_tuning,
    "mlx": _mlx,
}
