"""The affine operation in plain torch, tokens of equal adapters together: any device, the oracle of the others."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.extras_batch import IntArray32
from adapters.lora_batch import LoRABatch, RowRanges
from adapters.ops.affine_interface import AffineTable, rows_a_token


@dataclass(slots=True)
class StagedAffine:
    """Tokens by the adapters and weights they have."""

    num_tokens: int
    groups: list[tuple[RowRanges, Tensor]]  # entries, tokens int64 [num_group_tokens]

    def become(self, other: "StagedAffine") -> None:
        self.num_tokens, self.groups = other.num_tokens, other.groups


@dataclass(frozen=True, slots=True)
class ReferenceAffine:
    """One group's sites."""

    table: AffineTable
    sites: Sequence[int]
    widths: Sequence[int]

    def apply(self, ys: Sequence[Tensor], staged: StagedAffine) -> None:
        """y_m[t] = y_m[t] ⊙ (1 + Σ_e weight_e · d_e) + Σ_e weight_e · c_e for the tokens that have vectors."""
        for site, width, y in zip(self.sites, self.widths, ys, strict=True):
            rows_a_token(y, width, staged.num_tokens)
            rows = y.view(staged.num_tokens, -1, width)
            for entries, tokens in staged.groups:
                sums = self._sum(site, entries)
                if sums is not None:
                    tokens = tokens.to(y.device)
                    rows[tokens] = (rows[tokens].float() * (1 + sums[0]) + sums[1]).to(y.dtype)

    def _sum(self, site: int, entries: RowRanges) -> Tensor | None:
        """Σ_e weight_e · (d_e, c_e), float32 [2, width]; None when no entry has vectors at the site."""
        found = [(weight, self.table.vectors.get((site, start))) for start, weight in entries]
        parts = [weight * vectors for weight, vectors in found if vectors is not None]
        return torch.stack(parts).sum(0) if parts else None


def bind_affine(table: AffineTable, sites: Sequence[int], widths: Sequence[int]) -> ReferenceAffine:
    return ReferenceAffine(table, sites, widths)


def stage_affine(batch: LoRABatch, tokens: IntArray32) -> StagedAffine:
    groups: defaultdict[RowRanges, list[int]] = defaultdict(list)
    for token in tokens.tolist():
        entries = slice(int(batch.indptr[token]), int(batch.indptr[token + 1]))
        groups[tuple(zip(batch.starts[entries].tolist(), batch.weights[entries].tolist(), strict=True))].append(token)
    return StagedAffine(batch.num_tokens, [(entries, torch.tensor(found)) for entries, found in groups.items()])
