"""Places pairs of fused experts: sides, ranks and shapes settled against the base's experts, before data is read.

Knows nothing of names (placement.py resolves them) or of open files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from adapters.base_parts import ExpertsShape
from adapters.errors import AdapterRefused, RefusalCode
from adapters.expert_layout import ASide, ProductShape, Projection, product_of, side_of_a
from adapters.module_names import BaseModules
from adapters.proposal import ExpertProposal
from adapters.refusals import EXPERT_LAYOUT
from adapters.safetensors_header import TensorEntry

Entries = Mapping[str, TensorEntry]

EXPANSION = 4
"""Prepared bytes that there may be for each byte of files allowed: from one of two bytes a value to float32, and from
single gate and up projections to their product, zeros included. A file that holds all experts never needs more."""
_ITEM_BYTES = 4  # pairs are put together in float32 at most


@dataclass(frozen=True, slots=True)
class PlacedExperts:
    """One pair of the fused experts `module`: of a parameter, `side` being where A stands, or of a projection, of one
    expert or of all, where A stands on the input."""

    module: str
    pair: ExpertProposal
    side: ASide

    @property
    def is_down(self) -> bool:
        return self.pair.parameter in ("down_proj", "down")

    @property
    def projection(self) -> Projection:
        """Of one expert, or stacked."""
        return cast(Projection, self.pair.parameter)


def place_experts(
    proposals: Sequence[ExpertProposal],
    modules: Mapping[str, str],
    entries: Entries,
    base: BaseModules,
    *,
    max_lora_rank: int,
    max_bytes: int,
) -> tuple[PlacedExperts, ...]:
    """`modules`: source → name in the base; `max_bytes`: of all pairs as they are prepared. Raises AdapterRefused."""
    placed = []
    for pair in proposals:
        module = modules[pair.source]
        if module not in base.experts:
            why = f"{module} of the base does not keep its experts in one tensor"
            raise AdapterRefused(
                RefusalCode.UNSUPPORTED, why, "Target linear modules only", feature="experts", tensor=pair.inputs[0]
            )
        if pair.lora_rank > max_lora_rank:
            why = f"the experts have r={pair.lora_rank}, over max_lora_rank={max_lora_rank}"
            fix = f"Restart with --max-lora-rank {pair.lora_rank} or more"
            raise AdapterRefused(RefusalCode.TOO_LARGE, why, fix, feature="max_lora_rank", tensor=pair.inputs[0])
        placed.append(_place(pair, module, base.experts[module], entries))
    _check_whole(placed)
    _check_once(placed)
    _check_bytes(placed, base, max_bytes)
    return tuple(placed)


def _place(pair: ExpertProposal, module: str, experts: ExpertsShape, entries: Entries) -> PlacedExperts:
    lora_a, lora_b = (entries[name] for name in pair.inputs)
    if pair.form == "single":
        return _place_single(pair, module, experts, lora_a, lora_b)
    if pair.form == "stacked":
        return _place_stacked(pair, module, experts, lora_a, lora_b)
    is_down = pair.parameter == "down_proj"
    product = product_of(experts, is_down=is_down)
    wanted_rows = experts.num_experts * pair.lora_rank
    if lora_a.shape[0] != wanted_rows:
        raise _mismatch(lora_a, f"{module}.{pair.parameter} needs {experts.num_experts} experts of r={pair.lora_rank}")
    try:
        side = side_of_a(lora_a.shape[1], product, is_transposed=experts.is_transposed, peft_version=pair.peft_version)
    except ValueError as error:
        raise _mismatch(lora_a, str(error)) from error
    if side is None:
        why = f"{module}.{pair.parameter} is square, and the config does not say which PEFT wrote the pair"
        raise EXPERT_LAYOUT.error(feature="peft_version", tensor=lora_a.name, why=why)
    other = product.out_features if side == "input" else product.in_features
    _require(lora_b, (other, wanted_rows), f"{module}.{pair.parameter}")
    return PlacedExperts(module, pair, side)


def _place_single(
    pair: ExpertProposal, module: str, experts: ExpertsShape, lora_a: TensorEntry, lora_b: TensorEntry
) -> PlacedExperts:
    where = f"{module}.{pair.expert} ({pair.parameter})"
    assert pair.expert is not None
    if pair.expert >= experts.num_experts:
        why = f"{module} of the base has {experts.num_experts} experts, and the tensor is of number {pair.expert}"
        raise AdapterRefused(
            RefusalCode.WRONG_BASE, why, "Serve the base the adapter was trained on", tensor=lora_a.name
        )
    half = _half_of(pair, experts)
    _require(lora_a, (pair.lora_rank, half.in_features), where)
    _require(lora_b, (half.out_features, pair.lora_rank), where)
    return PlacedExperts(module, pair, "input")


def _place_stacked(
    pair: ExpertProposal, module: str, experts: ExpertsShape, lora_a: TensorEntry, lora_b: TensorEntry
) -> PlacedExperts:
    """Either half may be the same for all experts; MLX-LM's A had the ranks of all experts in one dimension before."""
    half, where = _half_of(pair, experts), f"{module} ({pair.parameter})"
    counts = (experts.num_experts, 1)
    fits_a: list[tuple[int, ...]] = [(count, pair.lora_rank, half.in_features) for count in counts]
    fits_a.append((experts.num_experts * pair.lora_rank, half.in_features))
    fits_b: list[tuple[int, ...]] = [(count, half.out_features, pair.lora_rank) for count in counts]
    for entry, fits in ((lora_a, fits_a), (lora_b, fits_b)):
        if entry.shape not in fits:
            raise _mismatch(entry, f"{where} needs {list(fits[0])}, or {list(fits[1])} for all experts alike")
    return PlacedExperts(module, pair, "input")


def _half_of(pair: ExpertProposal, experts: ExpertsShape) -> ProductShape:
    """The product of one projection."""
    product = product_of(experts, is_down=pair.parameter == "down")
    return ProductShape(product.in_features, product.out_features // (1 if pair.parameter == "down" else 2))


def _check_whole(placed: Sequence[PlacedExperts]) -> None:
    """One module is adapted as a whole or expert by expert, not both."""
    forms: dict[tuple[str, bool], str] = {}
    for each in placed:
        kind = each.pair.form if each.pair.form in ("single", "stacked") else "fused"
        if forms.setdefault((each.module, each.is_down), kind) != kind:
            why = f"{each.module} has pairs of several layouts: of single experts, and of all together"
            raise EXPERT_LAYOUT.error(feature="experts", tensor=each.pair.inputs[0], why=why)


def _check_once(placed: Sequence[PlacedExperts]) -> None:
    """Spellings are many (gate_proj, w1), and what each says of one product would lie upon the other."""
    seen: set[tuple[str, int | None, str]] = set()
    for each in placed:
        key = (each.module, each.pair.expert, each.pair.parameter)
        if key in seen:
            which = "" if each.pair.expert is None else f".{each.pair.expert}"
            why = f"the tensor and another one are both a pair of {each.module}{which} ({each.pair.parameter})"
            fix = "Save the adapter again, each expert under one name"
            raise AdapterRefused(RefusalCode.AMBIGUOUS_LAYOUT, why, fix, tensor=each.pair.inputs[0])
        seen.add(key)


def _check_bytes(placed: Sequence[PlacedExperts], base: BaseModules, max_bytes: int) -> None:
    """Every product has room for all experts, however few the files hold, so their size says nothing of it."""
    widths: dict[tuple[str, bool], dict[str, int]] = {}
    for each in placed:
        of_parts = widths.setdefault((each.module, each.is_down), {})
        of_parts[each.pair.parameter] = max(of_parts.get(each.pair.parameter, 0), each.pair.lora_rank)
    num_bytes = 0
    for (module, is_down), of_parts in widths.items():
        # gate and up of single experts keep ranks of their own in the one product, which so may be of twice
        # max_lora_rank: each projection obeys that, and no pool of rows has to hold these.
        product = product_of(base.experts[module], is_down=is_down)
        features = product.in_features + product.out_features
        num_bytes += base.experts[module].num_experts * sum(of_parts.values()) * features * _ITEM_BYTES
    if num_bytes > max_bytes:
        raise AdapterRefused(
            RefusalCode.TOO_LARGE,
            f"prepared for all experts of the base, its pairs take {num_bytes} bytes, over the limit of {max_bytes}",
            f"Restart with --max-adapter-bytes {-(-num_bytes // EXPANSION)} or more, or train a lower r on experts",
            feature="experts",
        )


def _require(entry: TensorEntry, wanted: tuple[int, int], where: str) -> None:
    if entry.shape != wanted:
        raise _mismatch(entry, f"{where} needs {list(wanted)}")


def _mismatch(entry: TensorEntry, why: str) -> AdapterRefused:
    return AdapterRefused(
        RefusalCode.SHAPE_MISMATCH,
        f"the tensor is {list(entry.shape)}; {why}",
        "Serve the base the adapter was trained on, or correct r",
        tensor=entry.name,
    )
