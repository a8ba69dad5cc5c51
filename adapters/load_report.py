"""What a load found, for people and for the reply to a load request: counts, features, how strong the adapter is.

An adapter that loads and does nothing is the field's usual failure, so the report says what matched and how large the
change is. Knows nothing of files.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from sys import intern

from adapters.lora_config import LoRAConfig
from adapters.lora_model import LoRAModel, LoRAWeights
from adapters.untrusted_json import shown

_MAX_NAMED = 5


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


def delta_norm(weights: LoRAWeights) -> float:
    """‖ΔW‖_F without forming ΔW: ‖BᵀA‖² = tr((B Bᵀ)(A Aᵀ)) with A [r, in] and B [r, out], two [r, r] products."""
    a, b = weights.lora_a.float(), weights.lora_b.float()
    gram_a, gram_b = (a @ a.T).double(), (b @ b.T).double()  # [r, r]
    return math.sqrt(max(0.0, float((gram_a * gram_b).sum())))


def delta_norms(modules: Mapping[str, LoRAWeights]) -> dict[str, float]:
    """Module kind → root of the summed squares, kinds in alphabetical order."""
    squares: Counter[str] = Counter()
    for name, weights in modules.items():
        squares[kind_of(name)] += delta_norm(weights) ** 2  # type: ignore[assignment]
    return {kind: math.sqrt(squares[kind]) for kind in sorted(squares)}


def report_of(
    model: LoRAModel, config: LoRAConfig, *, stored_dtypes: Iterable[str], warnings: Sequence[str]
) -> LoadReport:
    counts = Counter(kind_of(name) for name in model.modules)
    return LoadReport(
        modules=dict(sorted(counts.items())),
        num_params=sum(w.lora_a.numel() + w.lora_b.numel() for w in model.modules.values()),
        num_bytes=model.num_bytes,
        lora_rank=model.lora_rank,
        features=model.features,
        delta_norms=model.delta_norms or {},
        warnings=(*warnings, *_warnings_of(model)),
        base_model=config.base_model,
        stored_dtypes=tuple(sorted(set(stored_dtypes))),
    )


def absent_targets(config: LoRAConfig, modules: Iterable[str]) -> list[str]:
    """Warnings for what the config lists and the weights do not hold: the other half of the cross-check."""
    endings = {".".join(parts[i:]) for m in modules for parts in [m.split(".")] for i in range(len(parts))}
    absent = [target for target in config.target_modules if target not in endings and target != "all-linear"]
    return [f"target_modules lists {_some(absent)}, for which there are no tensors"] if absent else []


def _warnings_of(model: LoRAModel) -> list[str]:
    idle = [name for name, weights in model.modules.items() if not weights.lora_b.any()]
    if len(idle) == len(model.modules):
        return ["B is zero everywhere: the adapter has no effect"]
    return [f"B is zero, so there is no effect, in {len(idle)} modules: {_some(idle)}"] if idle else []


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(shown(name) for name in names[:_MAX_NAMED]) + more
