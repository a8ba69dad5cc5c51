"""Places a Proposal on a base: names resolved, shapes, ranks and sizes settled, before a byte of data is read.

Every tensor of the files must go somewhere, or be among those that change nothing, or the adapter is refused. Knows
nothing of formats, of open files or of the base's weights.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from adapters.errors import AdapterRefused, RefusalCode
from adapters.load_plan import PlacedPair, Placement
from adapters.lora_config import CONFIG_NAME
from adapters.module_names import BaseModules, LinearShape, Resolution, locate
from adapters.place_fused import FusedPlace, fused_places, join_parts, joint_places, split_pair
from adapters.place_parts import place_parts, shape_mismatch
from adapters.proposal import PairProposal, Proposal
from adapters.refusals import TORCHTUNE_MAGNITUDE
from adapters.safetensors_header import TensorEntry, require_floats, require_matrix, require_numbers

_REORDERED_BASES = frozenset({"llama", "mistral"})
"""Whose queries and keys torchtune holds in the order of Meta's files, by its convert_weights.hf_to_tune."""


def place(
    proposal: Proposal,
    entries: Mapping[str, TensorEntry],
    base: BaseModules,
    *,
    max_lora_rank: int,
    max_expert_bytes: int = 1 << 62,
    base_model: str | None = None,
) -> Placement:
    """`max_expert_bytes`: of pairs of fused experts as prepared. `base_model`: what the adapter declares, for people.

    Raises AdapterRefused (any code but those of data).
    """
    _check_consumed(proposal, entries)
    _check_kinds(proposal, entries)
    resolution = _located(proposal, base)
    _check_base(proposal.pairs, resolution, base, entries, base_model)
    pairs = _place_pairs(proposal.pairs, resolution, entries, base, max_lora_rank)
    placed = Placement(
        pairs=tuple(pairs),
        rewrite=resolution.rewrite,
        features=proposal.features,
        warnings=proposal.warnings,
        dropped=proposal.dropped,
    )
    limits = {"max_lora_rank": max_lora_rank, "max_expert_bytes": max_expert_bytes}
    return place_parts(placed, proposal, entries, resolution.modules, base, **limits)


def _place_pairs(
    proposed: Sequence[PairProposal],
    resolution: Resolution,
    entries: Mapping[str, TensorEntry],
    base: BaseModules,
    max_lora_rank: int,
) -> list[PlacedPair]:
    """Those of parts of one linear together, those of a linear that the base keeps apart in its parts."""
    pairs, parts = list[PlacedPair](), dict[str, list[tuple[FusedPlace, PlacedPair]]]()
    fused, joint = fused_places(base), joint_places(base)
    for pair in proposed:
        module = resolution.modules[pair.source]
        part = None if module in base.linears else fused.get(module)
        wider = joint.get(module)
        shape = part.shape if part is not None else wider[0] if wider is not None else _linear(module, pair, base)
        placed = _in_order(_place_pair(pair, module, shape, entries, base), base)
        _check_rank(placed.pair.lora_rank, _stored_ranks(placed.pair), max_lora_rank, pair.inputs[0])
        if part is not None:
            parts.setdefault(part.linear, []).append((part, placed))
        elif wider is not None:
            pairs += split_pair(placed, wider[1], base)
        else:
            pairs.append(placed)
    for linear, some in parts.items():
        joined = join_parts(linear, some, base)
        _check_rank(joined.pair.lora_rank, _stored_ranks(joined.pair), max_lora_rank, joined.inputs[0])
        pairs.append(joined)
    return pairs


def _in_order(placed: PlacedPair, base: BaseModules) -> PlacedPair:
    """torchtune's magnitudes of queries and keys, on bases whose rows it reorders when it reads and writes them."""
    pair = placed.pair
    if not pair.is_interleaved:
        return placed
    head_dim = base.head_dims.get(placed.module, 1)
    if base.model_type not in _REORDERED_BASES or head_dim % 2:
        raise TORCHTUNE_MAGNITUDE.error(tensor=pair.magnitude)
    magnitudes = tuple(replace(vector, interleaved=head_dim) for vector in placed.magnitudes)
    return replace(placed, pair=replace(pair, magnitude=None), of_parts=(magnitudes, placed.biases))


def _place_pair(
    pair: PairProposal, module: str, shape: LinearShape, entries: Mapping[str, TensorEntry], base: BaseModules
) -> PlacedPair:
    stored = [entries[name] for name in pair.inputs]
    if pair.fold is not None:
        shape = _check_folded(pair, stored, module, shape, base)
        return PlacedPair(module, pair, shape.in_features, shape.out_features)
    lora_a, lora_b = stored
    shape = _resized(lora_b, module, shape, base)
    pair = replace(pair, lora_rank=_check_shapes(lora_a, lora_b, module, shape))
    return PlacedPair(module, pair, shape.in_features, shape.out_features)


def _located(proposal: Proposal, base: BaseModules) -> Resolution:
    """All names together, so that one rule maps them; none of a module that adapters cannot change."""
    resolution = locate(_sources(proposal), base)
    parts = {part.name for part in (base.embedding, base.head) if part is not None}
    for name, module in resolution.modules.items():
        if module in base.excluded and not (module in parts or _is_placeable(module, base)):
            raise AdapterRefused(
                RefusalCode.UNSUPPORTED,
                base.excluded[module],
                "Train without it in target_modules, or leave its tensors out (`ignore`) if they are not needed",
                feature=f"target_modules={module}",
                tensor=name,
            )
    return resolution


def _is_placeable(module: str, base: BaseModules) -> bool:
    return module in base.norms or module in base.experts or module in base.routers


def _sources(proposal: Proposal) -> list[str]:
    sources = [pair.source for pair in proposal.pairs] + [pair.source for pair in proposal.embeddings]
    sources += [vector.source for vector in proposal.vectors] + [whole.source for whole in proposal.wholes]
    sources += [tokens.source for tokens in proposal.tokens] + [experts.source for experts in proposal.experts]
    return list(dict.fromkeys(sources))


def _inputs(proposal: Proposal) -> list[tuple[str, bool]]:
    """Every tensor that is an input, and whether several may share it, as VeRA's projections are."""
    found: list[tuple[str, bool]] = []
    for pair in proposal.pairs:
        found += [(name, pair.fold is not None) for name in pair.inputs]
        found += [(name, False) for name in (pair.magnitude, pair.bias) if name is not None]
    for embedding in proposal.embeddings:
        names = (embedding.lora_a, embedding.lora_b, embedding.magnitude)
        found += [(name, False) for name in names if name is not None]
    for whole in proposal.wholes:
        found += [(name, False) for name in (whole.weight, whole.bias) if name is not None]
    found += [(vector.input, False) for vector in proposal.vectors]
    found += [(tokens.input, False) for tokens in proposal.tokens]
    found += [(name, True) for experts in proposal.experts for name in experts.inputs]
    return found


def _check_consumed(proposal: Proposal, entries: Mapping[str, TensorEntry]) -> None:
    """Each tensor goes to one place."""
    inputs = _inputs(proposal)
    uses = Counter(name for name, is_shared in inputs if not is_shared)
    uses.update({name for name, is_shared in inputs if is_shared})
    uses.update(proposal.dropped)
    for name in entries:
        if uses[name] != 1:
            why = "nothing reads the tensor" if not uses[name] else f"the tensor has {uses[name]} meanings"
            code = RefusalCode.AMBIGUOUS_LAYOUT if uses[name] else RefusalCode.KEY_UNMATCHED
            raise AdapterRefused(
                code, f"{why}, and no tensor may be left over", "Save the adapter again with PEFT", tensor=name
            )
    if missing := uses.keys() - entries.keys():
        raise ValueError(f"a proposal names tensors that are not there: {sorted(missing)[:3]}")


def _check_kinds(proposal: Proposal, entries: Mapping[str, TensorEntry]) -> None:
    for pair in proposal.pairs:
        if pair.fold is None:
            for name in pair.inputs:
                require_matrix(entries[name])
    for name, _ in _inputs(proposal):
        require_numbers(entries[name])
        require_floats(entries[name])


def _linear(module: str, pair: PairProposal, base: BaseModules) -> LinearShape:
    """What a pair may be on: a linear, a router of experts or the head."""
    shape = base.linears.get(module) or base.routers.get(module)
    if shape is not None:
        return shape
    if base.head is not None and module == base.head.name:
        return LinearShape(base.head.in_features, base.head.out_features)
    raise AdapterRefused(
        RefusalCode.UNSUPPORTED,
        f"{module} is not a linear, and the tensors are a pair for one",
        "Train without it in target_modules",
        feature=f"target_modules={module}",
        tensor=pair.inputs[0],
    )


def _resized(lora_b: TensorEntry, module: str, shape: LinearShape, base: BaseModules) -> LinearShape:
    """A head has as many outputs as the adapter's vocabulary has tokens, whatever the base's; the parts of an adapter
    are compared with each other where they are placed."""
    if base.head is not None and module == base.head.name and len(lora_b.shape) == 2:
        return LinearShape(shape.in_features, lora_b.shape[0])
    return shape


def _check_base(
    pairs: Sequence[PairProposal],
    resolution: Resolution,
    base: BaseModules,
    entries: Mapping[str, TensorEntry],
    base_model: str | None,
) -> None:
    """When of several modules not one fits, the base is the wrong one, and one shape at a time would not say so."""
    on_linears = [pair for pair in pairs if resolution.modules[pair.source] in base.linears]
    if len(on_linears) < 2 or any(_fits(pair, resolution, base, entries) for pair in on_linears):
        return
    pair = on_linears[0]
    module = resolution.modules[pair.source]
    wanted, found = base.linears[module], _widths(pair, entries)
    raise AdapterRefused(
        RefusalCode.WRONG_BASE,
        f"none of {len(on_linears)} modules has the base's widths: {module} is {found[0]} → {found[1]} in the adapter, "
        f"{wanted.in_features} → {wanted.out_features} in the base",
        f"The adapter declares the base {base_model or 'nowhere'}: serve it on that one",
        feature="base_model_name_or_path",
        tensor=pair.inputs[0],
    )


def _widths(pair: PairProposal, entries: Mapping[str, TensorEntry]) -> tuple[int | None, int | None]:
    if pair.fold is not None:
        return pair.in_features, pair.out_features
    lora_a, lora_b = (entries[name] for name in pair.inputs)
    return lora_a.shape[1], lora_b.shape[0]


def _fits(pair: PairProposal, resolution: Resolution, base: BaseModules, entries: Mapping[str, TensorEntry]) -> bool:
    return _fits_widths(pair, _widths(pair, entries), base.linears[resolution.modules[pair.source]])


def _check_shapes(lora_a: TensorEntry, lora_b: TensorEntry, module: str, shape: LinearShape) -> int:
    """A must be [r, in_features] and B [out_features, r] exactly, padding nothing; returns r."""
    lora_rank = lora_a.shape[0]
    for entry, wanted in ((lora_a, (lora_rank, shape.in_features)), (lora_b, (shape.out_features, lora_rank))):
        if entry.shape != wanted:
            raise shape_mismatch(entry, module, wanted)
    return lora_rank


def _check_folded(
    pair: PairProposal, stored: Sequence[TensorEntry], module: str, shape: LinearShape, base: BaseModules
) -> LinearShape:
    """The proposer knows what the stored shapes come to; a head may be of another vocabulary."""
    if base.head is not None and module == base.head.name and pair.out_features is not None:
        shape = LinearShape(shape.in_features, pair.out_features)
    if not _fits_widths(pair, (pair.in_features, pair.out_features), shape):
        found = " → ".join("any" if width is None else str(width) for width in (pair.in_features, pair.out_features))
        shapes = " and ".join(str(list(entry.shape)) for entry in stored)
        raise AdapterRefused(
            RefusalCode.SHAPE_MISMATCH,
            f"the tensors {shapes} are for {found} features; {module} of the base has "
            f"{shape.in_features} → {shape.out_features}",
            "Serve the base the adapter was trained on",
            tensor=pair.inputs[0],
        )
    return shape


def _fits_widths(pair: PairProposal, found: tuple[int | None, int | None], shape: LinearShape) -> bool:
    widths = zip(found, (shape.in_features, shape.out_features), strict=True)
    fits = all(width in (None, wanted) for width, wanted in widths)
    return fits and (pair.fits is None or pair.fits(shape.in_features, shape.out_features))


def _stored_ranks(pair: PairProposal) -> tuple[int, int]:
    """What the tensors have and what the config says they have."""
    stored = pair.lora_rank if pair.stored_rank is None else pair.stored_rank
    return stored, stored if pair.declared_rank is None else pair.declared_rank


def _check_rank(lora_rank: int, stored: tuple[int, int], max_lora_rank: int, tensor: str) -> None:
    if lora_rank > max_lora_rank:
        raise AdapterRefused(
            RefusalCode.TOO_LARGE,
            f"the adapter has r={lora_rank}, over max_lora_rank={max_lora_rank}",
            f"Restart with --max-lora-rank {lora_rank} or more",
            feature="max_lora_rank",
            tensor=tensor,
        )
    found, declared = stored
    if found != declared:
        raise AdapterRefused(
            RefusalCode.SHAPE_MISMATCH,
            f"the tensor has rank {found}, {CONFIG_NAME} says {declared} for it, and the scale hangs on that",
            "Correct r or rank_pattern, or save the adapter again",
            feature=f"r={declared}",
            tensor=tensor,
        )
