"""What must be known of an adapter where requests are admitted: small, without weights. Knows no request.

`adapter_extras` says what each of these is; a plain adapter has none of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from adapters.adapter_ref import AdapterUse, AdapterVersion
from adapters.errors import AdapterCapacity
from adapters.lora_model import LoRAModel


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFacts:
    num_rows: int = 1  # of the pools
    vocab_size: int | None = None  # None = the base's
    invocation_tokens: tuple[int, ...] = ()
    replaced: frozenset[str] = frozenset()
    tokenizer_files: Mapping[str, bytes] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def has_tokenizer(self) -> bool:
        return bool(self.tokenizer_files)


NO_FACTS = AdapterFacts()


def facts_of(model: LoRAModel, num_rows: int) -> AdapterFacts:
    """`num_rows`: what LoRALayers.rows_of says it takes."""
    extras = model.extras
    return AdapterFacts(
        num_rows=num_rows,
        vocab_size=extras.vocab_size,
        invocation_tokens=extras.invocation_tokens,
        replaced=extras.replaced,
        tokenizer_files=extras.tokenizer_files,
    )


def both_replace(left: AdapterFacts, right: AdapterFacts) -> list[str]:
    """What two adapters both replace, in order; `<embedding>` is all of `<embedding>[id]`. The very same tokenizer is
    none of it: producers put the base's beside each adapter."""
    shared = (left.replaced & right.replaced) | _within(left.replaced, right.replaced)
    shared |= _within(right.replaced, left.replaced)
    if left.tokenizer_files == right.tokenizer_files:
        shared -= {"tokenizer"}
    return sorted(shared)


def _within(rows: frozenset[str], wholes: frozenset[str]) -> set[str]:
    """Those of `rows` that are single rows of something that stands in `wholes`."""
    return {row for row in rows if row.endswith("]") and row[: row.rindex("[")] in wholes}


def check_device_room(
    uses: Sequence[AdapterUse], facts: Mapping[AdapterVersion, AdapterFacts], num_rows: int, max_loras: int | None
) -> None:
    """Raises AdapterCapacity of adapters that do not fit into pools of `num_rows` ranks together, not even alone."""
    wanted = sum(facts[use.version].num_rows for use in uses)
    if wanted > num_rows:
        raise AdapterCapacity(
            f"the {len(uses)} adapters of this request take {wanted} ranks together, and all pools hold {num_rows}; "
            "name fewer, or restart with a larger --lora-memory"
        )
    if max_loras is not None and len(uses) > max_loras:
        raise AdapterCapacity(
            f"this request names {len(uses)} adapters and one step holds {max_loras}; name fewer, or restart with a "
            "larger --max-loras"
        )
