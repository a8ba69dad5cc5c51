"""Which rows of a step go to which expert: what a router chose, sorted by expert. Knows no weights and no adapters."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class ExpertGroups:
    """Token t's slot j has place t · k + j of the router's choice; `places` and `tokens` are by expert, then by token.

    `groups` says which rows of them are whose: an expert without any has no entry, nor a slot without an expert a row.
    """

    places: Tensor  # int64 [num_rows]
    tokens: Tensor  # int64 [num_rows]
    groups: IntArray  # [num_groups, 3] expert, first row, last row + 1

    @classmethod
    def of(cls, top_k_index: Tensor, num_experts: int) -> "ExpertGroups":
        """`top_k_index` [num_tokens, k]; a number beyond the experts marks a slot without one."""
        chosen = top_k_index.reshape(-1).cpu().numpy()
        order = np.argsort(chosen, kind="stable")
        counts = np.bincount(chosen, minlength=num_experts)[:num_experts]
        ends = np.cumsum(counts)
        hit = np.flatnonzero(counts)
        groups = np.stack([hit, ends[hit] - counts[hit], ends[hit]], axis=1)
        places = torch.from_numpy(order[: ends[-1]]).to(top_k_index.device)
        return cls(places, places // top_k_index.shape[-1], groups)

    @property
    def experts(self) -> Tensor:
        """int64 [num_rows], of each row."""
        return torch.from_numpy(np.repeat(self.groups[:, 0], self.groups[:, 2] - self.groups[:, 1]))

    def within(self, rows: Tensor) -> "ExpertGroups":
        """Those of `rows` (int64, ascending), in their order."""
        ends = np.searchsorted(rows.cpu().numpy(), self.groups[:, 2])
        begins = np.concatenate([[0], ends[:-1]])
        kept = ends > begins
        groups = np.stack([self.groups[:, 0], begins, ends], axis=1)[kept]
        return ExpertGroups(self.places[rows], self.tokens[rows], groups)
