"""A PEFT adapter saved as adapter_model.bin: the same tensors and the same config, without the pickle."""

from collections.abc import Mapping

from torch import Tensor

from adapters.convert.conversion import Conversion, SourceDelta
from adapters.convert.lora_pairs import LoRAPairs, sort_pairs
from adapters.convert.scale_rule import ScaleRule


def convert_peft_pickle(config: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Conversion:
    """Nothing is computed, so kinds of adapter that are unknown here come through as they are."""
    if config.get("peft_type") != "LORA":
        return Conversion(config, tensors, {}, tensors)
    pairs = sort_pairs(tensors)
    return Conversion(config, tensors, deltas_of(pairs, ScaleRule.of(config)), pairs.rest)


def deltas_of(pairs: LoRAPairs, rule: ScaleRule) -> dict[str, SourceDelta]:
    """s·B·A of every linear, s·Aᵀ·Bᵀ of every embedding."""
    of_linears = {m: SourceDelta.of_product(rule.scale_of(m), b, a) for m, (a, b) in pairs.linears.items()}
    of_embeddings = {m: SourceDelta.of_product(rule.scale_of(m), a.T, b.T) for m, (a, b) in pairs.embeddings.items()}
    return of_linears | of_embeddings
