"""The Triton kernel of the affine operation: one token, for one block of outputs of one module of a group.

Where an adapter's vectors lie is read from a table on the device by its first pool row, so a graph captured once serves
whatever adapters stand there. A program adds the vectors of its token's entries in their order, without atomics; a
token without entries ends at once, and one whose adapters have no vectors in a module writes nothing there.
"""

import triton
import triton.language as tl

from adapters.ops.affine_interface import ALIGNMENT
from adapters.ops.gpu_kernels import narrow

_STEP_FIELDS = ["tokens", "indptr", "entry_starts", "entry_weights"]
# Where a step's arrays happen to lie in the buffer must not compile a kernel anew.

_ALIGNMENT = tl.constexpr(ALIGNMENT)


@triton.jit
def _correct(  # type: ignore[no-untyped-def]
    y,  # [ROWS, WIDTH] of the token
    addresses,  # int64 [num_pool_rows] of this module
    entry_starts,
    entry_weights,
    begin,
    end,
    block,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y[:, n] = y[:, n] ⊙ (1 + Σ_e weight_e · d_e[n]) + Σ_e weight_e · c_e[n] over one block of outputs."""
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    gain = tl.full([BLOCK_N], 0.0, tl.float32)
    shift = tl.full([BLOCK_N], 0.0, tl.float32)
    num_found = 0
    for e in range(begin, end):
        address = tl.load(addresses + tl.load(entry_starts + e))
        weight = tl.load(entry_weights + e)
        width = tl.where(address != 0, WIDTH, 0)  # none is read where there are no vectors
        num_found += width
        vectors = tl.multiple_of(address.to(tl.pointer_type(tl.float32)), _ALIGNMENT)  # [2, WIDTH]: d and c
        inside = n < width
        gain += weight * tl.load(vectors + n, mask=inside, other=0.0)
        shift += weight * tl.load(vectors + WIDTH + n, mask=inside, other=0.0)
    if num_found > 0:
        for r0 in range(0, ROWS, BLOCK_ROWS):
            r = r0 + tl.arange(0, BLOCK_ROWS)
            place = y + r[:, None] * WIDTH + n[None, :]
            inside = (r < ROWS)[:, None] & (n < WIDTH)[None, :]
            y_n = tl.load(place, mask=inside, other=0.0).to(tl.float32)
            corrected = y_n * (1 + gain)[None, :] + shift[None, :]
            tl.store(place, narrow(corrected, y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize_on_alignment=_STEP_FIELDS)
def correct_tokens(  # type: ignore[no-untyped-def]
    ys,  # per module [num_tokens, ROWS[m], WIDTHS[m]]
    addresses,  # int64 [num_sites, num_pool_rows] of vectors float32 [2, width]; 0 = none
    sites,  # int32 [NUM_MODULES]
    tokens,  # int32 [num_affine]
    indptr,  # int32 [num_affine + 1]
    entry_starts,  # int32 [num_entries]
    entry_weights,  # float32 [num_entries]
    num_pool_rows,
    ROWS: tl.constexpr,
    WIDTHS: tl.constexpr,
    FIRST_BLOCKS: tl.constexpr,
    NUM_MODULES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Programs (i, block) correct token tokens[i]; blocks [FIRST_BLOCKS[m], FIRST_BLOCKS[m + 1]) are module m's."""
    i, block = tl.program_id(0), tl.program_id(1)
    begin = tl.load(indptr + i)
    end = tl.load(indptr + i + 1)
    if begin == end:
        return
    token = tl.load(tokens + i).to(tl.int64)
    for m in tl.static_range(NUM_MODULES):
        if block >= FIRST_BLOCKS[m] and block < FIRST_BLOCKS[m + 1]:
            _correct(
                ys[m] + token * ROWS[m] * WIDTHS[m],
                addresses + tl.load(sites + m).to(tl.int64) * num_pool_rows,
                entry_starts,
                entry_weights,
                begin,
                end,
                block - FIRST_BLOCKS[m],
                ROWS[m],
                WIDTHS[m],
                BLOCK_ROWS,
                BLOCK_N,
            )
