"""The rows of an output that adapters change in plain torch: each adapter's own output, mixed in by its weight.

For row i with adapters k: y[i] += Σ_k weight_k · (y_k[i] - y[i]). Knows no adapter and no module.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from adapters.extras_batch import ExtraRows


def blend(y: Tensor, parts: Sequence[ExtraRows], own: Callable[[int, Tensor], Tensor | None]) -> None:
    """Change y [num_rows, …] in place. `own(start, rows)` computes, from y as it was, the output float32
    [num_part_rows, …] that those rows would have with that adapter alone; None when the adapter changes nothing here.
    """
    sums: Tensor | None = None  # float32 like y: what several adapters of one row add
    for part in parts:
        rows = torch.from_numpy(part.rows).to(y.device)
        found = own(part.start, rows)
        if found is None:
            continue
        if not part.is_alone:
            sums = torch.zeros_like(y, dtype=torch.float32) if sums is None else sums
            sums[rows] += part.weight * (found - y[rows].float())
        elif part.weight == 1.0:
            y[rows] = found.to(y.dtype)
        else:
            y[rows] = torch.lerp(y[rows].float(), found, part.weight).to(y.dtype)
    if sums is not None:
        shared = torch.cat([torch.from_numpy(part.rows) for part in parts if not part.is_alone]).unique().to(y.device)
        y[shared] = (y[shared].float() + sums[shared]).to(y.dtype)
