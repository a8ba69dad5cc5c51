"""How large the pieces are that the GPU kernels work on, for each shape. Constants and integers; no torch, no Triton.

Everything here follows from a group's shape alone, never from the step: that is what makes a row's bits independent of
the rows beside it, and one captured graph right for any mix of adapters. Nothing is tuned at run time.

Sizes are chosen for an H200: 132 multiprocessors, 16-byte loads, about 60 MB of L2, matrix units that take 64 rows.

    kernel         shape             block              warps  why
    shrink rows    in <= 2048        K 256, one a split     4  small models: more programs rather than longer ones
                   in > 2048         K 512, one a split     4  rank 16 in bf16: 16 KB, 8 loads of 16 bytes a thread
    expand rows    out sum < 8192    N 256                  4  8 rows of 1024 outputs still make 32 programs
                   out sum >= 8192   N 512                  4  the partials are read once per N block: fewer blocks
    shrink tiles   bf16              M 64, K 128            4  one matrix-unit tile; 3 stages of 32 KB at rank 64
                   float32           M 64, K 32             4  every product is three of tf32: more would spill
                   splits            of 2048, at most 4        qkv of 2048 tokens: 192 programs, few partials to reread
    expand tiles   any               M 64, N 128            4  64 accumulators a thread, 4 programs a multiprocessor

Rank is never padded beyond a block of 16; only the shrink of tiles above rank 16 takes 64, so as to read x once.
"""

from dataclasses import dataclass

BLOCK_M = 64
"""Tokens of a tile."""

BLOCK_R = 16
"""Ranks taken at once; the least that the matrix units take."""

MAX_MODULES = 4
"""Modules of one group."""

MAX_ROW_PARTIALS = 64
"""Partial sums of one entry and rank, over the splits and modules of a group: bounds the workspace."""

MAX_TILE_PARTIALS = 16
"""The same for one token of a tile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """in_features cut into `count` equal spans of `steps` blocks; the last may reach beyond the end."""

    count: int
    steps: int
    block_k: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSizes:
    """What one group's four kernels use."""

    rows: Split
    tiles: Split
    row_block_n: int
    tile_block_n: int


def split(in_features: int, block_k: int, span: int, max_count: int) -> Split:
    """As many spans of `span` (a multiple of block_k) as in_features needs, at most max_count by growing them."""
    count = max(1, min(_ceil_div(in_features, span), max_count))
    steps = _ceil_div(in_features, count * block_k)
    return Split(count=_ceil_div(in_features, steps * block_k), steps=steps, block_k=block_k)


def block_sizes(in_features: int, out_features: tuple[int, ...], *, element_size: int) -> BlockSizes:
    """The table above; element_size is 2 or 4 bytes."""
    num_modules = len(out_features)
    row_block_k = 256 if in_features <= 2048 else 512
    return BlockSizes(
        rows=split(in_features, row_block_k, row_block_k, MAX_ROW_PARTIALS // num_modules),
        tiles=split(in_features, 128 if element_size == 2 else 32, 2048, MAX_TILE_PARTIALS // MAX_MODULES),
        row_block_n=256 if sum(out_features) < 8192 else 512,
        tile_block_n=128,
    )


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
