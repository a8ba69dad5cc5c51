"""Which conversion a source needs, and that conversion. What was asked for is held against what is there."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from adapters.base_weights import BaseWeights
from adapters.convert.base_outline import BaseOutline
from adapters.convert.conversion import Conversion, Progress, no_progress
from adapters.convert.failure import CannotConvert
from adapters.convert.loralib import LoralibOptions, convert_loralib, looks_like_loralib
from adapters.convert.pairs import PairsOptions, convert_pairs
from adapters.convert.peft_pickle import convert_peft_pickle
from adapters.convert.source_files import Source
from adapters.untrusted_json import shown

Format = Literal["peft-pickle", "loralib", "pissa", "olora", "kasa", "pairs"]


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
    """`weights` loads them, for the conversions that need them."""

    outline: BaseOutline
    weights: Callable[[], BaseWeights]


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
    assert kind == "peft-pickle"
    return convert_peft_pickle(config, source.tensors)


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
    if source.is_pickle:
        return "peft-pickle"
    raise CannotConvert(
        f"nothing to convert in {shown(source.weights.name)}: it is safetensors, and its config needs no "
        "other base. See what `loramux check` says of it"
    )
