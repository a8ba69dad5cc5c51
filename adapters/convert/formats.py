"""Which conversion a source needs, and that conversion. What was asked for is held against what is there."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from adapters.base_weights import BaseWeights
from adapters.convert.base_outline import BaseOutline
from adapters.convert.conversion import Conversion, Progress, no_progress
from adapters.convert.failure import CannotConvert
from adapters.convert.loralib import LoralibOptions, convert_loralib, looks_like_loralib
from adapters.convert.pairs import PairsOptions, convert_pairs
from adapters.convert.peft_pickle import convert_peft_pickle
from adapters.convert.singular import SingularBase, convert_singular
from adapters.convert.source_files import Source
from adapters.convert.taken_out import Method
from adapters.untrusted_json import shown

Format = Literal["peft-pickle", "loralib", "pissa", "olora", "kasa", "pairs"]

_NOT_REPLAYABLE = {
    "pissa_niter": "the base was changed by a random decomposition, which not even PEFT finds again at a load",
    "corda": "the base was changed by a decomposition that needs the training data",
    "loftq": "the base was quantised, and the adapter corrects that",
    "lora_ga": "the base was changed by a decomposition that needs gradients",
}
_SAVE_CONVERTED = (
    "Save it again where it was trained, with path_initial_model_for_weight_conversion, or serve the changed base"
)
_NOT_TOGETHER = (
    *("alora_invocation_tokens", "alora_invocation_string", "invocation_string", "target_parameters", "arrow_config"),
    *("layer_replication", "megatron_config", "use_qalora", "use_bdlora", "lora_bias", "velora_config"),
    "monteclora_config",
)


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """What the file does not say."""

    base_name: str = ""
    alpha: float | None = None
    rank: int | None = None
    enable_lora: tuple[bool, ...] | None = None
    name_map: Mapping[str, object] | None = None


@dataclass(frozen=True, slots=True)
class Base:
    """`weights` loads them, for the conversions that need them, and says in which dtype the checkpoint has them."""

    outline: BaseOutline
    weights: Callable[[], tuple[BaseWeights, torch.dtype]]


def format_of(source: Source, asked: Format | None, options: ConvertOptions) -> Format:
    """Raises CannotConvert when there is nothing to convert, or when it is not what was asked for."""
    found = _found(source, options)
    if asked is not None and asked != found:
        raise CannotConvert(f"--format {asked} was asked for, and {shown(source.weights.name)} is {found}")
    return found


def convert(
    source: Source, kind: Format, base: Base, options: ConvertOptions, progress: Progress = no_progress
) -> Conversion:
    """Raises CannotConvert, and AdapterRefused for patterns in the config that cannot be read."""
    if kind == "loralib":
        asked = LoralibOptions(options.base_name, _alpha(options), options.rank, options.enable_lora)
        return convert_loralib(source.tensors, base.outline, asked)
    if kind == "pairs":
        named = PairsOptions(options.base_name, options.name_map or {}, options.alpha, options.rank)
        return convert_pairs(source.tensors, base.outline, named)
    config = source.config or {}
    if kind == "peft-pickle":
        return convert_peft_pickle(config, source.tensors)
    progress("loading the base", 0, 1)
    weights, dtype = base.weights()
    return convert_singular(kind, config, source.tensors, SingularBase(base.outline, weights, dtype), progress)


def _alpha(options: ConvertOptions) -> float:
    if options.alpha is None:
        raise CannotConvert(
            "the file does not say lora_alpha, and ΔW is alpha/r · B·A: give the --alpha of the training"
        )
    return options.alpha


def _found(source: Source, options: ConvertOptions) -> Format:
    if options.name_map is not None:
        return "pairs"
    if looks_like_loralib(list(source.tensors)):
        return "loralib"
    if source.config is None:
        raise CannotConvert(
            f"{shown(source.weights.name)} has no adapter_config.json beside it and no names of loralib's in it; "
            "low-rank pairs of other names need --map"
        )
    if (method := _method_of(source.config)) is not None:
        return method
    if source.is_pickle:
        return "peft-pickle"
    raise CannotConvert(
        f"nothing to convert in {shown(source.weights.name)}: it is safetensors, and its config needs no other base. "
        "See what `loramux check` says of it"
    )


def _method_of(config: Mapping[str, object]) -> Method | None:
    """How the base was changed, when it can be told from the base. Raises CannotConvert when it cannot."""
    init = config.get("init_lora_weights")
    kind = init.lower() if isinstance(init, str) else ""
    for beginning, why in _NOT_REPLAYABLE.items():
        if kind.startswith(beginning):
            raise CannotConvert(f"init_lora_weights={shown(init)}: {why}. {_SAVE_CONVERTED}")
    method: Method | None = "pissa" if kind == "pissa" else "olora" if kind == "olora" else None
    if config.get("kasa_config"):
        if method is not None:
            raise CannotConvert(f"kasa_config with init_lora_weights={kind}: the base was changed twice")
        method = "kasa"
    together = next((name for name in _NOT_TOGETHER if config.get(name)), None)
    if method is not None and together is not None:
        raise CannotConvert(f"{method} with {together}={shown(config[together])} is not LoRA of any rank on the base")
    return method
