"""What an adapter holds besides pairs of linears as one run of bytes and a table of what lies where, and back.

Knows nothing of files, digests or where the bytes come from; the table comes from a header whose seal was whole.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from adapters.adapter_extras import AdapterExtras, EmbeddingAdapter, ExpertPair, ExpertPairs, HeadAdapter, TokenRows
from adapters.host_memory import ALIGNMENT

_MAPS = ("gains", "input_scales", "biases", "norms")
_DTYPES = {str(dtype): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.uint8)}


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor: its way from the top, such as ("experts", module, "gate_up", "a"), and where it lies."""

    way: tuple[str, ...]
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # bytes

    @property
    def end(self) -> int:
        return self.begin + prod(self.shape) * self.dtype.itemsize


def table_of(extras: AdapterExtras) -> str:
    """What `bytes_of` puts where, and everything that is no tensor, as JSON: equal extras have equal tables."""
    entries, _ = _laid_out(extras)
    fields = {
        "tensors": [[list(entry.way), str(entry.dtype), list(entry.shape)] for entry in entries],
        "gain_covers_bias": sorted(extras.gain_covers_bias),
        "vocab_size": extras.vocab_size,
        "invocation_tokens": list(extras.invocation_tokens),
        "replaced": sorted(extras.replaced),
        "base_print": extras.base_print,
    }
    return json.dumps(fields, separators=(",", ":"))


def num_bytes(extras: AdapterExtras) -> int:
    """What `write_into` needs."""
    return _laid_out(extras)[1]


def write_into(extras: AdapterExtras, memory: Tensor) -> None:
    """Put all tensors into `memory` [num_bytes] of bytes."""
    entries, _ = _laid_out(extras)
    for entry, (_, tensor) in zip(entries, _tensors(extras), strict=True):
        memory[entry.begin : entry.end].copy_(tensor.contiguous().view(torch.uint8).flatten())


def read_from(table: str, memory: Tensor) -> AdapterExtras:
    """The extras whose tensors lie in `memory` [num_bytes], as views of it. ValueError, KeyError or TypeError when the
    table is none, or not of so many bytes.
    """
    fields = json.loads(table)
    shapes = [(tuple(way), _DTYPES[dtype], tuple(shape)) for way, dtype, shape in fields["tensors"]]
    entries, total = _places(shapes)
    if total != len(memory):
        raise ValueError(f"a table of {total} bytes met {len(memory)}")
    tree: dict[str, Any] = {}
    for entry in entries:
        at = tree
        for step in entry.way[:-1]:
            at = at.setdefault(step, {})
        at[entry.way[-1]] = memory[entry.begin : entry.end].view(entry.dtype).view(entry.shape)
    return AdapterExtras(
        **{name: MappingProxyType(tree.get(name, {})) for name in _MAPS},
        gain_covers_bias=frozenset(fields["gain_covers_bias"]),
        embedding=_embedding(tree.get("embedding")),
        head=_head(tree.get("head")),
        experts=MappingProxyType({name: _pairs(parts) for name, parts in tree.get("experts", {}).items()}),
        vocab_size=fields["vocab_size"],
        invocation_tokens=tuple(fields["invocation_tokens"]),
        tokenizer_files=MappingProxyType(
            {name: data.numpy().tobytes() for name, data in tree.get("files", {}).items()}
        ),
        replaced=frozenset(fields["replaced"]),
        base_print=fields["base_print"],
    )


def _laid_out(extras: AdapterExtras) -> tuple[list[_Entry], int]:
    return _places([(way, tensor.dtype, tuple(tensor.shape)) for way, tensor in _tensors(extras)])


def _places(
    shapes: Sequence[tuple[tuple[str, ...], torch.dtype, tuple[int, ...]]],
) -> tuple[list[_Entry], int]:
    """One after the other, each at a multiple of ALIGNMENT; and where the last one ends."""
    entries, end = list[_Entry](), 0
    for way, dtype, shape in shapes:
        entries.append(entry := _Entry(way, dtype, shape, -(-end // ALIGNMENT) * ALIGNMENT))
        end = entry.end
    return entries, end


def _tensors(extras: AdapterExtras) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Every tensor and file with its way, always in the same order."""
    for name in _MAPS:
        yield from (((name, key), tensor) for key, tensor in sorted(getattr(extras, name).items()))
    for part, slots in (("embedding", ("lora_a", "lora_b", "weight")), ("head", ("weight", "bias"))):
        if (found := getattr(extras, part)) is not None:
            yield (part, "is_there"), torch.zeros(0, dtype=torch.uint8)
            yield from (((part, slot), getattr(found, slot)) for slot in slots if getattr(found, slot) is not None)
            if found.rows is not None:
                yield (part, "ids"), found.rows.ids
                yield (part, "values"), found.rows.values
    for module, pairs in sorted(extras.experts.items()):
        for kind, pair in (("gate_up", pairs.gate_up), ("down", pairs.down)):
            if pair is not None:
                yield ("experts", module, kind, "a"), pair.a
                yield ("experts", module, kind, "b"), pair.b
    for name, data in sorted(extras.tokenizer_files.items()):
        yield ("files", name), torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0).byte()


def _embedding(parts: Mapping[str, Tensor] | None) -> EmbeddingAdapter | None:
    if parts is None:
        return None
    return EmbeddingAdapter(parts.get("lora_a"), parts.get("lora_b"), _rows(parts), parts.get("weight"))


def _head(parts: Mapping[str, Tensor] | None) -> HeadAdapter | None:
    return None if parts is None else HeadAdapter(_rows(parts), parts.get("weight"), parts.get("bias"))


def _rows(parts: Mapping[str, Tensor]) -> TokenRows | None:
    return TokenRows(parts["ids"], parts["values"]) if "ids" in parts else None


def _pairs(parts: Mapping[str, Mapping[str, Tensor]]) -> ExpertPairs:
    def pair(kind: str) -> ExpertPair | None:
        return ExpertPair(parts[kind]["a"], parts[kind]["b"]) if kind in parts else None

    return ExpertPairs(gate_up=pair("gate_up"), down=pair("down"))
