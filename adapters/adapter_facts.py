"""What must be known of an adapter where requests are admitted: small, without weights. Knows no request.

`adapter_extras` says what each of these is; a plain adapter has none of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from adapters.adapter_ref import AdapterUse, AdapterVersion
from adapters.device_room import DeviceNeed, DeviceRoom
from adapters.errors import AdapterCapacity
from adapters.lora_model import LoRAModel


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFacts:
    need: DeviceNeed = DeviceNeed()
    vocab_size: int | None = None  # None = the base's
    invocation_tokens: tuple[int, ...] = ()
    replaced: frozenset[str] = frozenset()
    tokenizer_files: Mapping[str, bytes] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def has_tokenizer(self) -> bool:
        return bool(self.tokenizer_files)


NO_FACTS = AdapterFacts()


def facts_of(model: LoRAModel, need: DeviceNeed) -> AdapterFacts:
    """`need`: what LoRALayers.sizes says it takes."""
    extras = model.extras
    return AdapterFacts(
        need=need,
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
    uses: Sequence[AdapterUse], facts: Mapping[AdapterVersion, AdapterFacts], room: DeviceRoom
) -> None:
    """Raises AdapterCapacity of adapters that do not fit on the device together, not even with nobody else there."""
    wanted = sum(facts[use.version].need.num_rows for use in uses)
    if wanted > room.num_rows:
        raise AdapterCapacity(
            f"the {len(uses)} adapters of this request take {wanted} ranks together, and all pools hold "
            f"{room.num_rows}; name fewer, or restart with a larger --lora-memory"
        )
    if room.max_loras is not None and len(uses) > room.max_loras:
        raise AdapterCapacity(
            f"this request names {len(uses)} adapters and one step holds {room.max_loras}; name fewer, or restart with "
            "a larger --max-loras"
        )
    extra_bytes = sum(facts[use.version].need.num_extra_bytes for use in uses)
    if room.max_extra_bytes is not None and extra_bytes > room.max_extra_bytes:
        raise AdapterCapacity(
            f"the {len(uses)} adapters of this request take {extra_bytes} bytes of the device together beside their "
            f"pairs, over lora_extras_memory={room.max_extra_bytes}; name fewer, or restart with a larger "
            "--lora-extras-memory"
        )
