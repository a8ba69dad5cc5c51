"""What the affine operation is: outputs of linears and norms corrected for the rows whose adapters change them.

For token t of a step with the entries e of its CSR row, and every module m of a group,
    y_m[t] = y_m[t] ⊙ (1 + Σ_e weight_e · d_m,e) + Σ_e weight_e · c_m,e
in float32, rounded once to y's dtype, over the entries that have vectors at m. Tokens without keep their bits. A gain g
of the base's output is d = g - 1, an added bias is c; with replaced parameters a norm is affine in its own output.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from adapters.extras_batch import IntArray32
from adapters.lora_batch import LoRABatch

ALIGNMENT = 16
"""Bytes: where vectors begin, so that they can be read in wide loads."""


class AffineTable:
    """The vectors of all resident adapters, by site (a module) and first pool row."""

    def __init__(self, num_sites: int, num_rows: int, device: torch.device) -> None:
        self.addresses = torch.zeros(num_sites, num_rows, dtype=torch.int64, device=device)  # of vectors; 0 = none
        self.vectors: dict[tuple[int, int], Tensor] = {}  # (site, start) → float32 [2, width]: d and c
        self._sites: dict[int, list[int]] = {}  # first pool row → sites with vectors there

    def write(self, start: int, vectors: dict[int, Tensor]) -> None:
        """Put the vectors of an adapter, by site, in place of whatever began at pool row `start`."""
        self.clear(start)
        column = torch.zeros(len(self.addresses), dtype=torch.int64)  # [num_sites]
        for site, vector in vectors.items():
            assert vector.dtype is torch.float32 and vector.ndim == 2 and vector.is_contiguous()
            assert vector.data_ptr() % ALIGNMENT == 0, f"vectors that do not begin at a multiple of {ALIGNMENT} bytes"
            self.vectors[site, start] = vector
            column[site] = vector.data_ptr()
        self._sites[start] = list(vectors)
        self.addresses[:, start] = column.to(self.addresses.device)

    def clear(self, start: int) -> None:
        sites = self._sites.pop(start, None)
        if sites is not None:
            self.addresses[:, start] = 0  # before the vectors may go
            for site in sites:
                del self.vectors[site, start]

    def check_integrity(self) -> None:
        """Addresses and vectors tell the same story."""
        found = {(site, start): int(self.addresses[site, start]) for site, start in self.addresses.nonzero().tolist()}
        wanted = {place: vector.data_ptr() for place, vector in self.vectors.items()}
        assert found == wanted, "affine vectors stand where their table does not say"


class BoundAffine(Protocol):
    """One group's sites, ready to be applied."""

    def apply(self, ys: Sequence[Tensor], staged: Any) -> None:
        """Correct the outputs in place; `staged` is what `stage_affine` gave for this step.

        ys[m] is contiguous with the tokens outermost, and holds any number of rows [width] a token, such as the heads
        of a norm of queries; else RuntimeError.
        """


class AffineOps(Protocol):
    """One implementation; a module with these functions is one."""

    def bind_affine(self, table: AffineTable, sites: Sequence[int], widths: Sequence[int]) -> BoundAffine:
        """Prepare a group of modules that are corrected together."""

    def stage_affine(self, batch: LoRABatch, tokens: IntArray32) -> Any:
        """The step's batch and those of its tokens [num_affine] with an entry whose adapter has vectors, as `apply`
        takes them; made once per step."""


def rows_a_token(y: Tensor, width: int, num_tokens: int) -> int:
    """How many rows [width] of y belong to each token. Raises unless they divide evenly, so that no token is skipped or
    overrun."""
    rows, rest = divmod(y.numel(), num_tokens * width)
    if rest or rows == 0 or not y.is_contiguous():
        raise RuntimeError(
            f"affine vectors of width {width} for {num_tokens} tokens met y {tuple(y.shape)}, contiguous: "
            f"{y.is_contiguous()}: build the batch from the tokens of this forward pass"
        )
    return rows
