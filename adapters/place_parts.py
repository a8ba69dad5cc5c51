"""Places what is not a pair of a linear: embeddings, whole modules, rows of tokens, biases, norms, IA3's vectors.

Called by placement.py once names are resolved and pairs are placed. Knows nothing of open files or of data.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from adapters.errors import AdapterRefused, RefusalCode
from adapters.load_plan import PlacedPair, PlacedRows, PlacedVector, Placement
from adapters.module_names import BaseModules
from adapters.place_experts import place_experts
from adapters.place_vocabulary import WRONG_BASE, num_rows_of, part_of, vocab_size_of, width_of
from adapters.proposal import EmbeddingProposal, PairProposal, Proposal, TokensProposal, VectorProposal, WholeProposal
from adapters.safetensors_header import TensorEntry

Entries = Mapping[str, TensorEntry]
_RETRAIN = "Train without it, or merge it into a base of its own"


def place_parts(
    placed: Placement,
    proposal: Proposal,
    entries: Entries,
    modules: Mapping[str, str],
    base: BaseModules,
    *,
    max_lora_rank: int,
    max_expert_bytes: int,
) -> Placement:
    """`modules`: source → name in the base. Raises AdapterRefused."""
    limits = {"max_lora_rank": max_lora_rank, "max_bytes": max_expert_bytes}
    experts = place_experts(proposal.experts, modules, entries, base, **limits)
    vectors = [vector for pair in placed.pairs for vector in _of_pair(pair, entries)]
    vectors += [_vector(vector, modules[vector.source], entries, base) for vector in proposal.vectors]
    rows: list[PlacedRows] = []
    for whole in proposal.wholes:
        some_rows, some_vectors = _whole(whole, modules[whole.source], entries, base)
        rows += some_rows
        vectors += some_vectors
    for tokens in proposal.tokens:
        rows += _tokens(tokens, modules[tokens.source], entries, base)
    embedding, head_pairs = _embedding(proposal.embeddings, modules, entries, base, max_lora_rank)
    placed = replace(placed, pairs=(*placed.pairs, *head_pairs), vectors=tuple(vectors), rows=tuple(rows))
    placed = replace(placed, embedding=embedding, experts=experts, invocation_tokens=proposal.invocation_tokens)
    for pair in placed.pairs:
        _check_magnitude(pair, entries)
    _check_once(placed)
    return replace(placed, vocab_size=vocab_size_of(placed, entries, base))


def shape_mismatch(entry: TensorEntry, module: str, wanted: Sequence[int]) -> AdapterRefused:
    return AdapterRefused(
        RefusalCode.SHAPE_MISMATCH,
        f"the tensor is {list(entry.shape)}; {module} of the base needs {list(wanted)}",
        WRONG_BASE,
        tensor=entry.name,
    )


def _require(entry: TensorEntry, module: str, wanted: Sequence[int]) -> None:
    if entry.shape != tuple(wanted):
        raise shape_mismatch(entry, module, wanted)


def _unsupported(feature: str, why: str, tensor: str) -> AdapterRefused:
    return AdapterRefused(RefusalCode.UNSUPPORTED, why, _RETRAIN, feature=feature, tensor=tensor)


def _check_magnitude(pair: PlacedPair, entries: Entries) -> None:
    for magnitude in pair.magnitudes:
        _require(entries[magnitude.input], pair.module, (magnitude.stored_size(pair.out_features),))
        if pair.biases:
            raise _unsupported("lora_bias", "DoRA with a bias on B is not defined", pair.biases[0].input)


def _of_pair(pair: PlacedPair, entries: Entries) -> Iterator[PlacedVector]:
    """B's own bias, or those of parts."""
    for bias in pair.biases:
        _require(entries[bias.input], pair.module, (bias.stored_size(pair.out_features),))
        yield PlacedVector("lora_bias", pair.module, bias.input, bias.scale, bias)


def _vector(vector: VectorProposal, module: str, entries: Entries, base: BaseModules) -> PlacedVector:
    if vector.kind == "ia3":
        return _ia3(vector, module, entries[vector.input], base)
    if module in base.norms:
        which = "bias" if vector.kind == "bias" else "weight"
        return _norm(module, which, entries[vector.input], base)
    if vector.kind == "norm":
        raise _unsupported(
            f"target_modules={module}", f"{module} is not a norm, and the tensor is for one", vector.input
        )
    return _bias(module, entries[vector.input], base)


def _norm(module: str, which: str, entry: TensorEntry, base: BaseModules) -> PlacedVector:
    norm = base.norms[module]
    if which == "bias" and not norm.has_bias:
        raise _no_bias(module, entry)
    _require(entry, f"{module}.{which}", norm.shape)
    return PlacedVector("norm", f"{module}.{which}", entry.name)


def _bias(module: str, entry: TensorEntry, base: BaseModules) -> PlacedVector:
    """Of a linear or of the head."""
    if base.head is not None and module == base.head.name:
        if not base.head.has_bias:
            raise _no_bias(module, entry)
        if len(entry.shape) != 1:
            raise shape_mismatch(entry, module, (base.head.out_features,))
        return PlacedVector("head_bias", module, entry.name)
    if module not in base.linears:
        raise _unsupported("bias", f"{module} is neither a linear nor a norm", entry.name)
    if module not in base.biased:
        raise _no_bias(module, entry)
    _require(entry, module, (base.linears[module].out_features,))
    return PlacedVector("bias", module, entry.name)


def _no_bias(module: str, entry: TensorEntry) -> AdapterRefused:
    why = f"{module} of the base has no bias that the tensor could replace"
    return AdapterRefused(RefusalCode.SHAPE_MISMATCH, why, WRONG_BASE, feature="bias", tensor=entry.name)


def _ia3(vector: VectorProposal, module: str, entry: TensorEntry, base: BaseModules) -> PlacedVector:
    """Which side is scaled is what the shape says."""
    if module not in base.linears:
        raise _unsupported(f"target_modules={module}", f"{module} is not a linear", entry.name)
    shape = base.linears[module]
    fits = {"gain": (shape.out_features, 1), "input_scale": (1, shape.in_features)}
    if entry.shape == fits["gain"] == fits["input_scale"]:
        why = f"{module} is 1 → 1, so whether its input or its output is scaled is unknown"
        raise AdapterRefused(RefusalCode.AMBIGUOUS_LAYOUT, why, _RETRAIN, tensor=entry.name)
    if entry.shape == fits["gain"]:
        return PlacedVector("gain", module, entry.name)
    if entry.shape == fits["input_scale"]:
        return PlacedVector("input_scale", module, entry.name)
    raise shape_mismatch(entry, module, fits["gain"])


def _whole(
    whole: WholeProposal, module: str, entries: Entries, base: BaseModules
) -> tuple[list[PlacedRows], list[PlacedVector]]:
    part, inputs = part_of(module, base), [name for name in (whole.weight, whole.bias) if name is not None]
    if part is None and module not in base.norms:
        feature = "save_embedding_layers" if whole.is_copy else f"modules_to_save={module}"
        raise _unsupported(
            feature, "whole modules are replaced only where they are norms, embedding or head", inputs[0]
        )
    if part is None:
        tensors = {"weight": whole.weight, "bias": whole.bias}
        return [], [_norm(module, which, entries[name], base) for which, name in tensors.items() if name is not None]
    vectors = [] if whole.bias is None else [_bias(module, entries[whole.bias], base)]
    if whole.weight is None:
        return [], vectors
    entry = entries[whole.weight]
    if len(entry.shape) != 2 or entry.shape[1] != width_of(part, base):
        raise shape_mismatch(entry, module, (num_rows_of(part, base), width_of(part, base)))
    return [PlacedRows(part, entry.name, is_copy=whole.is_copy)], vectors


def _tokens(tokens: TokensProposal, module: str, entries: Entries, base: BaseModules) -> list[PlacedRows]:
    part, entry = part_of(module, base), entries[tokens.input]
    if part is None:
        why = f"{module} is neither the input embedding nor the head"
        raise _unsupported("trainable_token_indices", why, entry.name)
    _require(entry, f"trainable_token_indices ({len(tokens.ids)} tokens)", (len(tokens.ids), width_of(part, base)))
    if len(set(tokens.ids)) != len(tokens.ids):
        why = "trainable_token_indices names a token twice"
        raise AdapterRefused(
            RefusalCode.CORRUPT, why, "Save the adapter again", feature="trainable_token_indices", tensor=entry.name
        )
    rows = [PlacedRows(part, entry.name, tokens.ids)]
    if part == "embedding" and tokens.is_only and base.head is not None and base.head.is_tied:
        rows.append(PlacedRows("head", entry.name, tokens.ids))
    return rows


def _embedding(
    proposals: Sequence[EmbeddingProposal],
    modules: Mapping[str, str],
    entries: Entries,
    base: BaseModules,
    max_lora_rank: int,
) -> tuple[EmbeddingProposal | None, list[PlacedPair]]:
    """The pair of the input embedding, and what it means for a head that is tied to it."""
    for embedding in proposals:
        module = modules[embedding.source]
        if part_of(module, base) != "embedding":
            why = f"{module} is not the input embedding, whose lookups alone are adapted"
            raise _unsupported(f"target_modules={module}", why, embedding.lora_a)
        _check_embedding(embedding, module, entries, base, max_lora_rank)
    if len(proposals) > 1:
        raise _twice(proposals[1].source, proposals[1].lora_a)
    if not proposals or not (proposals[0].on_tied_head and base.head is not None and base.head.is_tied):
        return (proposals[0] if proposals else None), []
    embedding = proposals[0]
    if embedding.magnitude is not None:
        raise _unsupported("use_dora", "DoRA on an embedding that is the head, too, is not served", embedding.magnitude)
    return embedding, [_as_head(embedding, entries, base)]


def _check_embedding(
    embedding: EmbeddingProposal, module: str, entries: Entries, base: BaseModules, max_lora_rank: int
) -> None:
    lora_a, lora_b = entries[embedding.lora_a], entries[embedding.lora_b]
    rank, width = embedding.lora_rank, width_of("embedding", base)
    rows = lora_a.shape[0 if embedding.is_transposed else -1] if len(lora_a.shape) == 2 else 0
    _require(lora_a, module, (rows, rank) if embedding.is_transposed else (rank, rows))
    _require(lora_b, module, (rank, width) if embedding.is_transposed else (width, rank))
    if embedding.magnitude is not None:
        _require(entries[embedding.magnitude], module, (width,))
    if rank > max_lora_rank:
        why = f"the adapter has r={rank}, over max_lora_rank={max_lora_rank}"
        fix = f"Restart with --max-lora-rank {rank} or more"
        raise AdapterRefused(RefusalCode.TOO_LARGE, why, fix, feature="max_lora_rank", tensor=lora_a.name)
    if embedding.declared_rank not in (None, rank):
        why = f"the tensor has rank {rank}, the config says {embedding.declared_rank} for it"
        fix = "Correct r or rank_pattern, or save the adapter again"
        feature = f"r={embedding.declared_rank}"
        raise AdapterRefused(RefusalCode.SHAPE_MISMATCH, why, fix, feature=feature, tensor=lora_a.name)


def _as_head(embedding: EmbeddingProposal, entries: Entries, base: BaseModules) -> PlacedPair:
    """x (E + A B)ᵀ = x Eᵀ + (x Bᵀ) Aᵀ: the embedding's B is the head's A."""
    assert base.head is not None
    lora_a = entries[embedding.lora_a]
    num_rows = lora_a.shape[0 if embedding.is_transposed else 1]
    pair = PairProposal(
        source=embedding.source,
        inputs=(embedding.lora_b, embedding.lora_a),
        scale=embedding.scale,
        lora_rank=embedding.lora_rank,
        fold=_turned if embedding.is_transposed else _turned_from_peft,
    )
    return PlacedPair(base.head.name, pair, base.head.in_features, num_rows)


def _turned(stored: Sequence[Tensor], in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
    """[r, hidden], [V', r], as they are."""
    return stored[0], stored[1]


def _turned_from_peft(stored: Sequence[Tensor], in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
    """[hidden, r], [r, V'] → [r, hidden], [V', r]."""
    return stored[0].T, stored[1].T


def _check_once(placed: Placement) -> None:
    """Nothing has two owners: not a pair, a vector, nor the whole of a part."""
    seen: set[tuple[str, str]] = set()
    owners = [("pair", pair.module, pair.pair.inputs[0]) for pair in placed.pairs]
    owners += [("gain", pair.module, pair.pair.inputs[0]) for pair in placed.pairs if pair.magnitudes]
    owners += [
        (vector.kind, f"{vector.name}{'' if vector.part is None else vector.part.rows}", vector.input)
        for vector in placed.vectors
    ]
    owners += [("whole" if rows.ids is None else "tokens", rows.part, rows.input) for rows in placed.rows]
    for kind, name, tensor in owners:
        if (kind, name) in seen:
            raise _twice(name, tensor)
        seen.add((kind, name))


def _twice(name: str, tensor: str) -> AdapterRefused:
    why = f"the tensor and another one both say what {name} becomes"
    return AdapterRefused(RefusalCode.AMBIGUOUS_LAYOUT, why, "Save one adapter per folder", tensor=tensor)
