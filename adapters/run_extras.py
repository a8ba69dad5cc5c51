"""Computes what is not copied: folded pairs, gains of DoRA, and everything an adapter holds besides pairs of linears.

From tensors that run_plan.py has read and set aside, and from the base's weights where they are needed. Knows nothing
of files or formats.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from adapters.adapter_extras import NO_EXTRAS, AdapterExtras, EmbeddingAdapter, HeadAdapter, TokenRows
from adapters.base_weights import BaseWeights, dora_gain, embedding_dora_gain
from adapters.errors import AdapterRefused, RefusalCode
from adapters.load_plan import Part, PlacedPair, PlacedRows, PlacedVector
from adapters.packed_modules import PackedModules
from adapters.replaced_rows import ReplacedRows
from adapters.run_experts import run_experts
from adapters.run_sources import Sources
from adapters.whole_rows import compare


@dataclass(slots=True)
class _Made:
    """What there is so far."""

    gains: dict[str, Tensor] = field(default_factory=dict)
    covers_bias: set[str] = field(default_factory=set)
    input_scales: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    head_bias: Tensor | None = None
    rows: dict[Part, TokenRows] = field(default_factory=dict)
    whole: dict[Part, Tensor] = field(default_factory=dict)
    replaced: set[str] = field(default_factory=set)
    dropped: list[str] = field(default_factory=list)


def run_extras(sources: Sources, modules: PackedModules) -> tuple[AdapterExtras, tuple[str, ...]]:
    """The extras, and the tensors that turned out as the base has them. Pairs that runs did not copy are written into
    `modules`. Raises AdapterRefused: nonfinite, too_large."""
    placement, made = sources.plan.placement, _Made()
    if placement.is_plain and not placement.invocation_tokens and placement.vocab_size is None:
        return NO_EXTRAS, ()
    for rows in sorted(placement.rows, key=lambda each: each.ids is not None):  # rows of tokens lie upon whole ones
        _replace_rows(rows, sources, made)
    _check_full(made, sources)
    for pair in placement.pairs:
        if not pair.is_copied:
            _fold_pair(pair, sources, made, modules)
    for vector in sorted(placement.vectors, key=lambda each: each.kind not in ("gain", "input_scale")):
        _add_vector(vector, sources, made)
    embedding = _embedding(sources, made)
    experts = run_experts(
        placement.experts,
        sources.plan.base.experts,
        sources.floats,
        lambda tensor, name: _ready(tensor, name, sources.dtype),
        sources.dtype,
    )
    head = HeadAdapter(made.rows.get("head"), made.whole.get("head"), _head_bias(sources, made))
    has_head = head.rows is not None or head.weight is not None or head.bias is not None
    _name_replaced(sources, made)
    return AdapterExtras(
        gains=made.gains,
        gain_covers_bias=frozenset(made.covers_bias),
        input_scales=made.input_scales,
        biases=made.biases,
        norms=made.norms,
        embedding=embedding,
        head=head if has_head else None,
        experts=experts,
        vocab_size=placement.vocab_size,
        invocation_tokens=placement.invocation_tokens,
        replaced=frozenset(made.replaced),
        base_print=sources.base().fingerprint if placement.needs_weights else "",
    ), tuple(made.dropped)


def _head_bias(sources: Sources, made: _Made) -> Tensor | None:
    """Where tokens of the head were trained, PEFT computes it without its bias, in training, too."""
    head = sources.plan.base.head
    if head is not None and head.has_bias and any(r.part == "head" and r.ids for r in sources.plan.placement.rows):
        return torch.zeros(head.out_features)
    return made.head_bias


def check_finite(tensor: Tensor, name: str, when: str) -> None:
    finite = torch.isfinite(tensor)
    if not finite.all():
        count = tensor.numel() - int(finite.sum())
        raise AdapterRefused(
            RefusalCode.NONFINITE,
            f"{count} of {tensor.numel()} values are NaN or infinite {when}",
            "The training diverged or the file is damaged: use an earlier checkpoint",
            tensor=name,
        )


def _ready(tensor: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """`tensor` as it is computed with, its own memory, finite."""
    ready = tensor.to(dtype)
    check_finite(ready, name, f"in {str(dtype).removeprefix('torch.')}")
    return ready.contiguous()


def _replace_rows(rows: PlacedRows, sources: Sources, made: _Made) -> None:
    values = _ready(sources.kept[rows.input], rows.input, sources.dtype)  # [n or V', hidden]
    if rows.ids is not None:
        order = torch.tensor(rows.ids, dtype=torch.int64).sort()
        made.rows[rows.part] = _over(made.rows.get(rows.part), TokenRows(order.values, values[order.indices]))
        return
    found = compare(sources.base(), f"{_name_of(rows.part, sources)}.weight", values)
    if found.is_equal:
        made.dropped.append(rows.input)
    if found.rows is not None:
        made.rows[rows.part] = found.rows
    if found.weight is not None:
        made.whole[rows.part] = found.weight


def _over(under: TokenRows | None, over: TokenRows) -> TokenRows:
    """The rows of both; where both have one, that of `over`."""
    if under is None:
        return over
    is_left = ~torch.isin(under.ids, over.ids)
    order = torch.cat([under.ids[is_left], over.ids]).sort()
    return TokenRows(order.values, torch.cat([under.values[is_left], over.values])[order.indices])


def _check_full(made: _Made, sources: Sources) -> None:
    num_bytes = sum(weight.numel() * weight.element_size() for weight in made.whole.values())
    if num_bytes > sources.max_full_bytes:
        names = " and ".join(_name_of(part, sources) for part in made.whole)
        raise AdapterRefused(
            RefusalCode.TOO_LARGE,
            f"its own {names} takes {num_bytes} bytes, over max_full_bytes={sources.max_full_bytes}",
            f"Restart with --max-full-bytes {num_bytes} or more, or train rows of tokens alone",
            feature="max_full_bytes",
        )


def _name_of(part: Part, sources: Sources) -> str:
    base = sources.plan.base
    shape = base.embedding if part == "embedding" else base.head
    assert shape is not None, "placement.py placed rows on it"
    return shape.name


def _fold_pair(placed: PlacedPair, sources: Sources, made: _Made, modules: PackedModules) -> None:
    """A and B in float32, gain and scale in B, then the cast."""
    pair, target = placed.pair, modules[placed.module]
    stored = [sources.kept[name] for name in pair.inputs]  # shared ones are large: a fold converts what it takes
    lora_a, lora_b = stored if pair.fold is None else pair.fold(stored, placed.in_features, placed.out_features)
    lora_a, lora_b = lora_a.float(), lora_b.float() * pair.scale  # [out, r]
    if placed.magnitudes:
        gain = _gain(placed, lora_a, lora_b, sources, made)
        made.gains[placed.module] = gain
        if pair.gain_covers_bias:
            made.covers_bias.add(placed.module)
        lora_b = gain[:, None] * lora_b
    if lora_a.shape != target.lora_a.shape or lora_b.T.shape != target.lora_b.shape:  # `copy_` would repeat one row
        raise ValueError(f"{placed.module}: a fold gave {tuple(lora_a.shape)} and {tuple(lora_b.shape)}")
    target.lora_a.copy_(lora_a)
    target.lora_b.copy_(lora_b.T)


def _gain(placed: PlacedPair, lora_a: Tensor, lora_b: Tensor, sources: Sources, made: _Made) -> Tensor:
    """DoRA's [out]: one on rows that no magnitude is for."""
    magnitude, is_scaled = torch.zeros(len(lora_b)), torch.zeros(len(lora_b), dtype=torch.bool)
    for part in placed.magnitudes:
        magnitude[part.index()] = part.of(sources.floats(part.input))
        is_scaled[part.index()] = True
    weights, parameter = _replaced(sources, made), f"{placed.module}.weight"
    gain = dora_gain(weights, parameter, lora_a, lora_b, magnitude, on_rows=sources.on_rows)
    gain = torch.where(is_scaled, gain, torch.ones(()))
    for part in placed.magnitudes:
        check_finite(gain[part.index()], part.input, "as a gain")
    return gain


def _add_vector(vector: PlacedVector, sources: Sources, made: _Made) -> None:
    """IA3's come first, so that a bias knows whether it is scaled."""
    name, values = vector.name, _ready(sources.floats(vector.input), vector.input, torch.float32)
    if vector.kind == "gain":
        made.gains[name] = values.flatten()
        made.covers_bias.add(name)
    elif vector.kind == "input_scale":
        made.input_scales[name] = values.flatten()
    elif vector.kind == "norm":
        made.norms[name] = _ready(values, vector.input, sources.dtype)
        made.replaced.add(name)
    elif vector.kind == "head_bias":
        made.head_bias = values
        made.replaced.add(f"{name}.bias")
    else:
        _add_bias(vector, values, sources, made)


def _add_bias(vector: PlacedVector, values: Tensor, sources: Sources, made: _Made) -> None:
    delta = values * vector.scale  # [out], or [n] of a part's rows
    if vector.part is not None:
        whole = torch.zeros(sources.plan.base.linears[vector.name].out_features)
        whole[vector.part.index()] = vector.part.of(delta)
        delta = whole
    if vector.kind == "bias":
        delta = values - sources.base().rows(f"{vector.name}.bias", 0, len(values)).float()
        if vector.name in made.covers_bias:
            delta = delta * made.gains[vector.name]
        if not delta.any():
            made.dropped.append(vector.input)
            return
        made.replaced.add(f"{vector.name}.bias")
    check_finite(delta, vector.input, "after scaling")
    before = made.biases.get(vector.name)
    made.biases[vector.name] = delta if before is None else before + delta


def _embedding(sources: Sources, made: _Made) -> EmbeddingAdapter | None:
    lora_a = lora_b = None
    pair = sources.plan.placement.embedding
    if pair is not None:
        lora_a, lora_b = sources.floats(pair.lora_a), sources.floats(pair.lora_b)
        if not pair.is_transposed:
            lora_a, lora_b = lora_a.T, lora_b.T  # [V', r], [r, hidden]
        lora_b = lora_b * pair.scale
        if pair.magnitude is not None:
            weights, name = _replaced(sources, made), _name_of("embedding", sources)
            magnitude = sources.floats(pair.magnitude)
            gain = embedding_dora_gain(weights, f"{name}.weight", lora_a, lora_b, magnitude, on_rows=sources.on_rows)
            check_finite(gain, pair.magnitude, "as a gain")
            made.gains[name] = gain
            lora_b = gain * lora_b
        lora_a, lora_b = _ready(lora_a, pair.lora_a, sources.dtype), _ready(lora_b, pair.lora_b, sources.dtype)
    rows, weight = made.rows.get("embedding"), made.whole.get("embedding")
    if lora_a is None and rows is None and weight is None:
        return None
    return EmbeddingAdapter(lora_a, lora_b, rows, weight)


def _name_replaced(sources: Sources, made: _Made) -> None:
    for part in made.whole:
        made.replaced.add(_name_of(part, sources))
    for part, rows in made.rows.items():
        name = _name_of(part, sources)
        made.replaced.update(f"{name}[{token}]" for token in rows.ids.tolist())
    if sources.plan.placement.vocab_size is not None:
        made.replaced.add("vocabulary")


def _replaced(sources: Sources, made: _Made) -> BaseWeights:
    """The base's weights with the rows that the adapter puts in their place, which a gain is computed from."""
    if not (made.rows or made.whole):
        return sources.base()
    parts = made.rows.keys() | made.whole.keys()
    named = {f"{_name_of(part, sources)}.weight": part for part in parts}
    rows = {name: made.rows[part] for name, part in named.items() if part in made.rows}
    wholes = {name: made.whole[part] for name, part in named.items() if part in made.whole}
    return ReplacedRows(sources.base(), rows, wholes)
