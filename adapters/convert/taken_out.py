"""What PEFT takes out of a base's weight W [out, in] before it trains, by two ways that have no step in common.

    PiSSA   U_r Σ_r V_r, the r largest singular components       KaSA   the r smallest
    OLoRA   s · Q_r R_r, the first r columns and rows of W = QR, of W as it is stored

`factors` does what PEFT does, in float32, and gives two thin factors. `dense_rows` gives rows of the same matrix in
float64 from an eigendecomposition of W's Gram matrix, or from a least-squares projection. Source: PEFT 0.21,
tuners/lora/layer.py (pissa_init, olora_init) and tuners/lora/variants.py (KasaLinearVariant).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adapters.convert.conversion import RowsOf

Method = Literal["pissa", "olora", "kasa"]

_AT_ONCE = 1 << 22  # elements of W that are in float64 together: 32 MiB


@dataclass(frozen=True, slots=True)
class TakenOut:
    """left [out, k] · right [k, in]. `gap`: how far the singular values kept and taken lie apart, over the largest."""

    left: Tensor
    right: Tensor
    gap: float = 1.0


def factors(method: Method, weight: Tensor, r: int, scale: float, *, is_transposed: bool) -> TakenOut:
    """`weight` [out, in] float32; `is_transposed`: the base stores it [in, out]."""
    if method == "olora":
        q, upper = torch.linalg.qr(weight.T if is_transposed else weight)
        left, right = scale * q[:, :r], upper[:r]
        return TakenOut(right.T, left.T) if is_transposed else TakenOut(left, right)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    if method == "pissa":
        root = s[:r].sqrt()
        return TakenOut(u[:, :r] * root, root[:, None] * vh[:r], _gap(s, r))
    kept = len(s) - r
    return TakenOut(u[:, kept:] * s[kept:], vh[kept:], _gap(s, kept))


def dense_rows(method: Method, weight: Tensor, r: int, scale: float, *, is_transposed: bool) -> RowsOf:
    """(begin, end) → those rows of left · right, float64."""
    if method == "olora":
        return _projected(weight, r, scale, is_transposed)
    if weight.shape[0] >= weight.shape[1]:
        basis = _eigenvectors(weight, r, is_largest=method == "pissa")  # [in, r]
        return lambda begin, end: weight[begin:end].double() @ basis @ basis.T
    basis = _eigenvectors(weight.T, r, is_largest=method == "pissa")  # [out, r]
    seen = torch.zeros(r, weight.shape[1], dtype=torch.float64)
    for begin, end in _pieces(weight):
        seen += basis[begin:end].T @ weight[begin:end].double()
    return lambda begin, end: basis[begin:end] @ seen


def _eigenvectors(tall: Tensor, r: int, *, is_largest: bool) -> Tensor:
    """Of tallᵀ·tall [n, n], the r of the largest or smallest eigenvalues: [n, r]."""
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64)
    for begin, end in _pieces(tall):
        piece = tall[begin:end].double()
        gram.addmm_(piece.T, piece)
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors  # of ascending eigenvalues
    return vectors[:, -r:] if is_largest else vectors[:, :r]


def _projected(weight: Tensor, r: int, scale: float, is_transposed: bool) -> RowsOf:
    """s · C (CᵀC)⁻¹ Cᵀ W with C the first r columns of W as stored: Q_r R_r is W seen through their span."""
    stored = weight.T if is_transposed else weight
    columns = stored[:, :r].double()
    seen = torch.cat([columns.T @ stored[:, b:e].double() for b, e in _pieces(stored.T)], dim=1)
    solved = torch.linalg.solve(columns.T @ columns, seen)  # [r, width of stored]
    if is_transposed:
        return lambda begin, end: scale * (columns @ solved[:, begin:end]).T
    return lambda begin, end: scale * (columns[begin:end] @ solved)


def _pieces(weight: Tensor) -> list[tuple[int, int]]:
    at_once = max(1, _AT_ONCE // weight.shape[1])
    return [(begin, min(begin + at_once, len(weight))) for begin in range(0, len(weight), at_once)]


def _gap(s: Tensor, at: int) -> float:
    return float((s[at - 1] - s[at]) / s[0]) if 0 < at < len(s) else 1.0
