"""Plain LoRA as PEFT saves it → a Proposal. Knows nothing of bases, files or data."""

from collections.abc import Mapping

from adapters.errors import AdapterRefused, RefusalCode
from adapters.lora_config import LoRAConfig
from adapters.proposal import PairProposal, Proposal
from adapters.safetensors_header import TensorEntry, require_matrix
from adapters.tensor_names import read_names


def propose(config: LoRAConfig, entries: Mapping[str, TensorEntry]) -> Proposal:
    """`entries` in the order of their names. Raises AdapterRefused for whatever is not plain."""
    found: dict[str, dict[str, TensorEntry]] = {}
    for name in read_names(list(entries)):
        found.setdefault(name.module, {})[name.half] = entries[name.key]
    for halves in found.values():
        _require_both(halves)
    for entry in entries.values():
        require_matrix(entry)
    pairs = tuple(_pair(source, halves, config) for source, halves in sorted(found.items()))
    return Proposal(pairs=pairs, features=config.features)


def _pair(source: str, halves: Mapping[str, TensorEntry], config: LoRAConfig) -> PairProposal:
    lora_a, lora_b = halves["lora_A"], halves["lora_B"]
    return PairProposal(
        source=source,
        inputs=(lora_a.name, lora_b.name),
        scale=config.scale_of(source),
        lora_rank=lora_a.shape[0],
        declared_rank=config.rank_of(source),
    )


def _require_both(halves: Mapping[str, TensorEntry]) -> None:
    if len(halves) == 1:
        (half, entry), other = next(iter(halves.items())), "lora_B" if "lora_A" in halves else "lora_A"
        raise AdapterRefused(
            RefusalCode.INCOMPLETE_PAIR,
            f"{half} has no {other} beside it, so the module cannot be computed",
            "The file is incomplete: save the adapter again",
            tensor=entry.name,
        )
