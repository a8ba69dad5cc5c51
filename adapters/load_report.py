"""What a load found, for people and for the reply to a load request: counts, features, how strong the adapter is.

An adapter that loads and does nothing is the field's usual failure, so the report says what matched and how large the
change is. Knows nothing of files.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from sys import intern

import torch
from torch import Tensor

from adapters.lora_config import LoRAConfig
from adapters.lora_model import LoRAModel, LoRAWeights
from adapters.untrusted_json import shown

_MAX_NAMED = 5
_AT_ONCE = 1 << 20  # elements of A or B that are computed together: 4 MiB in float32


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """Bytes are those in host memory, in the compute dtype. `modules` and `delta_norms` are by module kind (q_proj)."""

    modules: Mapping[str, int]
    num_params: int
    num_bytes: int
    lora_rank: int  # the widest
    features: tuple[str, ...]
    delta_norms: Mapping[str, float]
    warnings: tuple[str, ...]
    base_model: str | None  # as the adapter declares it
    stored_dtypes: tuple[str, ...]

    @property
    def num_modules(self) -> int:
        return sum(self.modules.values())

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "num_modules": self.num_modules,
            "modules": dict(self.modules),
            "num_params": self.num_params,
            "num_bytes": self.num_bytes,
            "lora_rank": self.lora_rank,
            "features": list(self.features),
            "delta_norms": {kind: round(norm, 6) for kind, norm in self.delta_norms.items()},
            "warnings": list(self.warnings),
            "base_model": self.base_model,
            "stored_dtypes": list(self.stored_dtypes),
        }


def kind_of(module: str) -> str:
    """model.layers.3.self_attn.q_proj → q_proj, one string for all: every adapter's report is kept."""
    return intern(module.rpartition(".")[2])


def module_norms(modules: Mapping[str, LoRAWeights]) -> dict[str, float]:
    """Module → ‖ΔW‖_F without forming ΔW: ‖BᵀA‖² = tr((B Bᵀ)(A Aᵀ)) with A [r, in] and B [r, out], two [r, r] products.

    Modules of one shape are computed together.
    """
    alike: dict[tuple[int, int, int], list[str]] = {}
    for name, weights in modules.items():
        alike.setdefault((weights.lora_rank, weights.lora_a.shape[1], weights.lora_b.shape[1]), []).append(name)
    norms: dict[str, float] = {}
    for (lora_rank, in_features, out_features), names in alike.items():
        at_once = max(1, _AT_ONCE // (lora_rank * max(in_features, out_features)))
        for begin in range(0, len(names), at_once):
            some = names[begin : begin + at_once]
            gram_a = _grams([modules[name].lora_a for name in some])  # [n, r, r]
            gram_b = _grams([modules[name].lora_b for name in some])
            squares = (gram_a * gram_b).sum((1, 2)).clamp_(min=0.0)  # [n]
            norms.update(zip(some, squares.sqrt().tolist(), strict=True))
    return norms


def _grams(matrices: Sequence[Tensor]) -> Tensor:
    """[r, k] each → M Mᵀ, [n, r, r] in float64, summed in float32."""
    stacked = torch.stack(list(matrices)).float()
    return torch.bmm(stacked, stacked.transpose(1, 2)).double()


def norms_by_kind(norms: Mapping[str, float]) -> dict[str, float]:
    """Module kind → root of the summed squares of its modules, kinds in alphabetical order."""
    squares: Counter[str] = Counter()
    for name, norm in norms.items():
        squares[kind_of(name)] += norm**2  # type: ignore[assignment]
    return {kind: math.sqrt(squares[kind]) for kind in sorted(squares)}


def report_of(
    model: LoRAModel, config: LoRAConfig, *, num_params: int, stored_dtypes: Iterable[str], warnings: Sequence[str]
) -> LoadReport:
    counts = Counter(kind_of(name) for name in model.modules)
    return LoadReport(
        modules=dict(sorted(counts.items())),
        num_params=num_params,
        num_bytes=model.num_bytes,
        lora_rank=model.lora_rank,
        features=model.features,
        delta_norms=model.delta_norms or {},
        warnings=tuple(warnings),
        base_model=config.base_model,
        stored_dtypes=tuple(sorted(set(stored_dtypes))),
    )


def absent_targets(config: LoRAConfig, modules: Iterable[str]) -> list[str]:
    """Warnings for what the config lists and the weights do not hold: the other half of the cross-check."""
    endings = {".".join(parts[i:]) for m in modules for parts in [m.split(".")] for i in range(len(parts))}
    absent = [target for target in config.target_modules if target not in endings and target != "all-linear"]
    return [f"target_modules lists {_some(absent)}, for which there are no tensors"] if absent else []


def idle_modules(modules: Mapping[str, LoRAWeights], norms: Mapping[str, float]) -> list[str]:
    """Warnings for modules without effect. A norm may be zero of values that are not, so those are looked at."""
    idle = [name for name, norm in norms.items() if norm == 0 and not modules[name].lora_b.any()]
    if len(idle) == len(norms):
        return ["B is zero everywhere: the adapter has no effect"]
    return [f"B is zero, so there is no effect, in {len(idle)} modules: {_some(idle)}"] if idle else []


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(shown(name) for name in names[:_MAX_NAMED]) + more
