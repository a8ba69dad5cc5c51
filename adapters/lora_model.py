"""A checked LoRA adapter in host memory: what the loader makes and the row-range pools copy from. Immutable."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from adapters.adapter_extras import NO_EXTRAS, AdapterExtras
from adapters.adapter_ref import AdapterVersion


@dataclass(frozen=True, slots=True)
class LoRAWeights:
    """One targeted module of one adapter, in the compute dtype: Δy = (x · lora_aᵀ) · lora_b.

    `lora_b` is stored rank-major (the transpose of PEFT's lora_B) and already carries the scale alpha/r
    (or alpha/√r) and the gain of DoRA, folded in float32 before the cast, so that a pool row and a rank are the same
    thing.
    """

    lora_a: Tensor  # [r, in_features]
    lora_b: Tensor  # [r, out_features]

    @property
    def lora_rank(self) -> int:
        return self.lora_a.shape[0]

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.lora_a, self.lora_b))


@runtime_checkable
class HasSizes(Protocol):
    """Modules that know their sizes without making hundreds of tensors."""

    def sizes(self) -> Iterable[tuple[int, int]]:
        """Rank and bytes of each."""


def _sizes_of(modules: Mapping[str, LoRAWeights]) -> Iterable[tuple[int, int]]:
    if isinstance(modules, HasSizes):
        return modules.sizes()
    return ((weights.lora_rank, weights.num_bytes) for weights in modules.values())


@dataclass(frozen=True, slots=True)
class LoRAModel:
    """All modules of one adapter version, keyed by the full module name in the base model."""

    version: AdapterVersion
    modules: Mapping[str, LoRAWeights]  # of what is loaded from files, views made at each look-up (packed_modules.py)
    features: tuple[str, ...] = ()  # what was found beyond plain LoRA, e.g. "rslora", "rank_pattern"
    delta_norms: Mapping[str, float] | None = None  # module kind (q_proj, …) -> root of summed ‖ΔW‖²
    extras: AdapterExtras = NO_EXTRAS  # what is not a low-rank pair of a linear
    lora_rank: int = field(init=False)  # the widest rank among the modules; 0 = no pair at all
    num_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        sizes = list(_sizes_of(self.modules))
        object.__setattr__(self, "lora_rank", max((lora_rank for lora_rank, _ in sizes), default=0))
        num_bytes = sum(num_bytes for _, num_bytes in sizes) + self.extras.num_bytes
        object.__setattr__(self, "num_bytes", num_bytes)
