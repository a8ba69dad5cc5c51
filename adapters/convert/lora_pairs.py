"""The tensors of a PEFT file sorted into pairs of linears, pairs of embeddings, and the rest. Names only.

A pair is A [r, in] and B [out, r] of a linear, A [r, V] and B [H, r] of an embedding; both as PEFT stores them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from adapters.convert.failure import CannotConvert
from adapters.tensor_names import common_wrapper
from adapters.untrusted_json import shown

PREFIX = "base_model.model."
_HALF = re.compile(
    r"(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<half>[AB])(?P<infix>\.(?!weight$)[^.]+)?(?P<end>\.weight)?"
)

Pair = tuple[Tensor, Tensor]  # A, B


@dataclass(frozen=True, slots=True)
class LoRAPairs:
    """By module, as the file calls it without `wrapper`, which all names begin with; `rest` by the whole name."""

    wrapper: str
    linears: Mapping[str, Pair]
    embeddings: Mapping[str, Pair]
    rest: Mapping[str, Tensor]


def linear_tensors(module: str, pair: Pair, *, wrapper: str = PREFIX) -> dict[str, Tensor]:
    """A and B of a linear under PEFT's names."""
    return {f"{wrapper}{module}.lora_A.weight": pair[0], f"{wrapper}{module}.lora_B.weight": pair[1]}


def embedding_tensors(module: str, pair: Pair, *, wrapper: str = PREFIX) -> dict[str, Tensor]:
    """A and B of an embedding under PEFT's names."""
    return {f"{wrapper}{module}.lora_embedding_A": pair[0], f"{wrapper}{module}.lora_embedding_B": pair[1]}


def sort_pairs(tensors: Mapping[str, Tensor]) -> LoRAPairs:
    """Raises CannotConvert when a pair lacks a half or a half comes twice."""
    wrapper = common_wrapper(list(tensors))
    halves: dict[tuple[bool, str], dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in sorted(tensors.items()):
        name = key[len(wrapper) :]
        found = _HALF.fullmatch(name)
        if found is None or tensor.ndim != 2 or bool(found["end"]) is bool(found["kind"]):
            rest[key] = tensor
            continue
        pair = halves.setdefault((bool(found["kind"]), found["module"]), {})
        if found["half"] in pair:
            raise CannotConvert(f"{shown(key)} comes under two adapter names; save one adapter per file")
        pair[found["half"]] = tensor
    pairs = {place: _whole(place[1], pair) for place, pair in halves.items()}
    linears = {module: pair for (is_embedding, module), pair in pairs.items() if not is_embedding}
    embeddings = {module: pair for (is_embedding, module), pair in pairs.items() if is_embedding}
    return LoRAPairs(wrapper, linears, embeddings, rest)


def _whole(module: str, pair: Mapping[str, Tensor]) -> Pair:
    if len(pair) != 2 or pair["A"].shape[0] != pair["B"].shape[1]:
        raise CannotConvert(f"A and B of {shown(module)} do not fit each other, or one of them is missing")
    return pair["A"], pair["B"]
