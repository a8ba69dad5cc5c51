"""What tells bfloat16 from float32 in the loop of bf16_tile.py: the multiplication, and how sums become a row.

In LLVM's terms. Knows no rows and no weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]

from adapters.ops.bf16_dot import PAIRS, BFloat, declare, declare_dot

_SUMS = ir.VectorType(ir.FloatType(), 16)
_NARROW = ir.VectorType(BFloat(), 16)


@dataclass(frozen=True, slots=True)
class TileElement:
    """How four bytes of a row, spread over 16 lanes, are multiplied and added, and 16 sums become part of a row."""

    lanes: Any
    declare_dot: Callable[[Any], Any]
    dot: Callable[[Any, Any, Any, Any, Any], Any]  # builder, what was declared, sums, spread, weights
    store: Callable[[Any, list[Any], Any], None]  # builder, sums of a row, address


def _store_narrow(builder: Any, sums: list[Any], address: Any) -> None:
    narrow = declare(builder, "llvm.x86.avx512bf16.cvtneps2bf16.512", ir.FunctionType(_NARROW, [_SUMS]))
    _store(builder, [builder.call(narrow, [each]) for each in sums], address, _NARROW)


def _store_wide(builder: Any, sums: list[Any], address: Any) -> None:
    _store(builder, sums, address, _SUMS)


def _store(builder: Any, values: list[Any], address: Any, kind: Any) -> None:
    out = builder.inttoptr(address, kind.as_pointer())
    for number, each in enumerate(values):
        builder.store(each, builder.gep(out, [ir.Constant(ir.IntType(64), number)]), align=2)


def _declare_fma(builder: Any) -> Any:
    return declare(builder, "llvm.fma.v16f32", ir.FunctionType(_SUMS, [_SUMS, _SUMS, _SUMS]))


BFLOAT16 = TileElement(PAIRS, declare_dot, lambda b, dot, sums, x, w: b.call(dot, [sums, x, w]), _store_narrow)
FLOAT32 = TileElement(_SUMS, _declare_fma, lambda b, fma, sums, x, w: b.call(fma, [x, w, sums]), _store_wide)
