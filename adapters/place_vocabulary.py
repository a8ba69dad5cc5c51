"""How many tokens an adapter's vocabulary has, and whether embedding and head have a row for each of them.

From shapes alone. Knows nothing of tokenizers or of data.
"""

from collections.abc import Mapping, Sequence

from adapters.errors import AdapterRefused, RefusalCode
from adapters.load_plan import Part, Placement
from adapters.module_names import BaseModules
from adapters.safetensors_header import TensorEntry

WRONG_BASE = "Serve the base the adapter was trained on"


def vocab_size_of(placed: Placement, entries: Mapping[str, TensorEntry], base: BaseModules) -> int | None:
    """How many tokens the adapter's vocabulary has; None: as many as the base's."""
    found = _vocabularies(placed, entries, base)
    parts: tuple[Part, ...] = ("embedding", "head")
    sizes = {part: num_rows_of(part, base) for part in parts if num_rows_of(part, base)}
    if not sizes:  # a base of linears alone, of which nothing is known
        return None
    size = next(iter((found or sizes).values()))
    for tensor, each in found.items():
        if each != size:
            why = f"the tensor is for {each} tokens, {next(iter(found))} for {size}"
            raise AdapterRefused(RefusalCode.SHAPE_MISMATCH, why, "Save the adapter again", tensor=tensor)
    for rows in placed.rows:
        _check_ids(rows.ids or (), size, "trainable_token_indices", rows.input)
    _check_ids(placed.invocation_tokens, size, "alora_invocation_tokens", None)
    for part, num_rows in sizes.items():
        if size > num_rows and found:
            _require_new_rows(part, placed, size, base, next(iter(found)))
    return None if set(sizes.values()) == {size} else size


def _check_ids(ids: Sequence[int], size: int, feature: str, tensor: str | None) -> None:
    if max(ids, default=0) >= size:
        why = f"{feature} names token {max(ids)} of a vocabulary of {size}"
        raise AdapterRefused(RefusalCode.SHAPE_MISMATCH, why, WRONG_BASE, feature=feature, tensor=tensor)


def _vocabularies(placed: Placement, entries: Mapping[str, TensorEntry], base: BaseModules) -> dict[str, int]:
    """Tensor → the number of tokens it is for."""
    found = {rows.input: entries[rows.input].shape[0] for rows in placed.rows if rows.ids is None}
    if placed.embedding is not None:
        shape = entries[placed.embedding.lora_a].shape
        found[placed.embedding.lora_a] = shape[0 if placed.embedding.is_transposed else 1]
    for pair in placed.pairs:
        if part_of(pair.module, base) == "head":
            found[pair.pair.inputs[-1]] = pair.out_features
    found |= {v.input: entries[v.input].shape[0] for v in placed.vectors if v.kind == "head_bias"}
    return found


def _require_new_rows(part: Part, placed: Placement, size: int, base: BaseModules, tensor: str) -> None:
    """Tokens that the base does not have need rows of their own, in the embedding and in the head."""
    own = num_rows_of(part, base)
    brought = {token for rows in placed.rows if rows.part == part for token in rows.ids or () if token >= own}
    is_whole = any(rows.part == part and rows.ids is None for rows in placed.rows)
    num_missing = 0 if is_whole else size - own - len(brought)
    if num_missing:
        raise AdapterRefused(
            RefusalCode.INCOMPLETE_PAIR,
            f"the vocabulary has {size} tokens, the base {num_rows_of(part, base)}, and the {part} has no rows for "
            f"{num_missing} of them",
            "Save the adapter with save_embedding_layers=True",
            feature="save_embedding_layers",
            tensor=tensor,
        )


def part_of(module: str, base: BaseModules) -> Part | None:
    if base.embedding is not None and module == base.embedding.name:
        return "embedding"
    return "head" if base.head is not None and module == base.head.name else None


def width_of(part: Part, base: BaseModules) -> int:
    assert base.embedding is not None or base.head is not None
    if part == "embedding" and base.embedding is not None:
        return base.embedding.width
    return base.head.in_features if base.head is not None else 0


def num_rows_of(part: Part, base: BaseModules) -> int:
    if part == "embedding" and base.embedding is not None:
        return base.embedding.num_rows
    return base.head.out_features if base.head is not None else 0
