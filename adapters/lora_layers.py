"""Gives the linears of a resident base model their pools and their delta, without touching a base weight.

A linear is served by swapping its class for a generated subclass: names in state_dict, isinstance, tied weights and
quantised subclasses stay as they are, and a step without adapters costs one attribute check a module. All modules of a
model read one `Step`, set for the length of a forward pass. Knows nothing of requests, versions or eviction: row
ranges come from outside.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from adapters.adapter_ref import AdapterVersion
from adapters.lora_batch import LoRABatch
from adapters.lora_model import LoRAModel, LoRAWeights
from adapters.module_names import BaseModules, LinearShape
from adapters.ops import BoundLoRA, LoRAOps

_STATE = "loramux_lora"


@dataclass(slots=True)
class Step:
    """What the forward pass under way applies; None outside one and in a step of base rows only."""

    batch: LoRABatch | None = None
    is_running: bool = False


@dataclass(slots=True, kw_only=True)
class ModuleLoRA:
    """The pools of one linear: rows [start, start + ranks[start]) are one adapter's, rank-major."""

    step: Step
    a_pool: Tensor  # [num_rows, in_features]
    b_pool: Tensor  # [num_rows, out_features]
    ranks: npt.NDArray[np.int32]  # [num_rows] 0 where no adapter that targets this module starts
    bound: BoundLoRA
    instance_forward: Callable[[Tensor], Tensor] | None  # hung on the instance by someone else; still in charge
    num_targeting: int = 0  # adapters in the pools that have a rank here

    def write(self, start: int, weights: LoRAWeights) -> None:
        """Rows [start, start + r) := lora_a, lora_b."""
        end = start + weights.lora_rank
        self.a_pool[start:end].copy_(weights.lora_a)
        self.b_pool[start:end].copy_(weights.lora_b)
        self.ranks[start] = weights.lora_rank
        self.num_targeting += weights.lora_rank > 0

    def clear(self, start: int) -> None:
        self.num_targeting -= bool(self.ranks[start])
        self.ranks[start] = 0


class LoRALinear(nn.Module):
    """Mixed in before a linear's own class: y = base(x), then y += the step's deltas."""

    def forward(self, x: Tensor) -> Tensor:
        lora: ModuleLoRA = self.__dict__[_STATE]
        y: Tensor = super().forward(x) if lora.instance_forward is None else lora.instance_forward(x)
        batch = lora.step.batch
        if batch is None or not lora.num_targeting:
            return y
        y = y.contiguous()
        lora.bound.add(y, x, batch)
        return y


class LoRALayers:
    """All linears of `base` in `model`, swapped, with pools of `num_rows` rows each in the module's own dtype."""

    def __init__(self, model: nn.Module, base: BaseModules, *, num_rows: int, ops: LoRAOps) -> None:
        if num_rows < 1:
            raise ValueError(f"LoRA pools of {num_rows} rows hold no adapter: raise the memory for LoRA")
        linears = {name: _linear(model, name, shape) for name, shape in base.linears.items()}
        self.num_rows = num_rows
        self._shapes = base.linears
        self._step = Step()
        self._written: dict[int, LoRAModel] = {}  # first row → the adapter whose numbers stand there
        self._modules = {name: self._pools(linear, base.linears[name], ops) for name, linear in linears.items()}
        for name, linear in linears.items():  # nothing can fail from here on, so no model is left half swapped
            linear.__dict__.pop("forward", None)
            linear.__dict__[_STATE] = self._modules[name]
            linear.__class__ = _lora_class(type(linear))  # type: ignore[arg-type]  # mypy doubts that classes hash

    @staticmethod
    def bytes_per_row(base: BaseModules, dtype: torch.dtype) -> int:
        """Pool bytes that one rank of an adapter takes over all modules."""
        return sum(shape.in_features + shape.out_features for shape in base.linears.values()) * dtype.itemsize

    def write(self, start: int, model: LoRAModel) -> None:
        """Copy an adapter into rows [start, start + its rank) of every module's pools, over whatever was there.

        ValueError, and nothing written, when a module is not one of the base's, a shape differs, or the rows end
        beyond the pools.
        """
        self._check(start, model)
        self.clear(start, model.lora_rank)
        self._written[start] = model  # before the copies, so that `clear` undoes them when one fails
        for name, weights in model.modules.items():
            self._modules[name].write(start, weights)

    def version_at(self, start: int) -> AdapterVersion | None:
        """Whose numbers begin at pool row `start`; None when nobody's do."""
        model = self._written.get(start)
        return None if model is None else model.version

    def clear(self, start: int, length: int) -> None:
        """Forget every adapter that has a row in [start, start + length). Its numbers stay but are not read again."""
        end = start + length
        for first in [f for f, model in self._written.items() if f < end and start < f + model.lora_rank]:
            for lora in self._modules.values():
                lora.clear(first)
            del self._written[first]

    @contextmanager
    def applying(self, batch: LoRABatch | None) -> Iterator[None]:
        """Apply `batch` in the forward passes inside; None = base rows only. RuntimeError when nested."""
        if self._step.is_running:
            raise RuntimeError("a LoRA batch is already being applied to this model")
        self._step.is_running, self._step.batch = True, batch
        try:
            yield
        finally:
            self._step.is_running, self._step.batch = False, None

    def check_integrity(self) -> None:
        """Ranges are disjoint and inside the pools; a module has ranks only where an adapter starts."""
        end = 0
        for start, model in sorted(self._written.items()):
            assert start >= end, f"row {start} belongs to two adapters"
            end = start + model.lora_rank
        assert end <= self.num_rows, f"an adapter ends at row {end} of {self.num_rows}"
        for name, lora in self._modules.items():
            starts = np.flatnonzero(lora.ranks)
            assert lora.num_targeting == len(starts), f"{name} counts {lora.num_targeting} adapters of {len(starts)}"
            for start in starts.tolist():
                assert start in self._written, f"{name} has a rank at row {start}, where no adapter begins"
                assert lora.ranks[start] <= self._written[start].lora_rank, f"{name} has a rank too wide at row {start}"

    def _check(self, start: int, model: LoRAModel) -> None:
        if start < 0 or start + model.lora_rank > self.num_rows:
            raise ValueError(f"rows [{start}, {start + model.lora_rank}) are outside pools of {self.num_rows} rows")
        for name, weights in model.modules.items():
            if name not in self._modules:
                raise ValueError(f"version {model.version} targets {name}, which is not a linear of the base")
            shape, rank = self._shapes[name], weights.lora_rank
            got = (tuple(weights.lora_a.shape), tuple(weights.lora_b.shape))
            if got != ((rank, shape.in_features), (rank, shape.out_features)):
                raise ValueError(f"version {model.version} has {got} at {name}, a module of {shape}")

    def _pools(self, linear: nn.Module, shape: LinearShape, ops: LoRAOps) -> ModuleLoRA:
        weight = linear.get_parameter("weight")
        # empty, not zeros: on CPU untouched pages take no memory, and no row is read before it is written.
        a_pool = torch.empty(self.num_rows, shape.in_features, dtype=weight.dtype, device=weight.device)
        b_pool = torch.empty(self.num_rows, shape.out_features, dtype=weight.dtype, device=weight.device)
        ranks = np.zeros(self.num_rows, dtype=np.int32)
        return ModuleLoRA(
            step=self._step,
            a_pool=a_pool,
            b_pool=b_pool,
            ranks=ranks,
            bound=ops.bind(a_pool, b_pool, ranks),
            instance_forward=linear.__dict__.get("forward"),
        )


def rows_for_budget(base: BaseModules, dtype: torch.dtype, memory_bytes: int) -> int:
    """How many pool rows `memory_bytes` buy; 0 when not even one."""
    return memory_bytes // LoRALayers.bytes_per_row(base, dtype)


@cache
def _lora_class(linear: type[nn.Module]) -> type[nn.Module]:
    """The subclass that adds LoRA to `linear`, one for each class of linear."""
    namespace: dict[str, Any] = {"__module__": __name__, "__doc__": f"{linear.__name__} with LoRA added to its rows."}
    return type(f"LoRA{linear.__name__}", (LoRALinear, linear), namespace)


def _linear(model: nn.Module, name: str, shape: LinearShape) -> nn.Module:
    """The module `name`, checked to have the shape `base` says and not to be swapped yet."""
    module = model.get_submodule(name)
    if isinstance(module, LoRALinear):
        raise ValueError(f"{name} has LoRA layers already: one LoRALayers per model, one name per module")
    elements = shape.in_features * shape.out_features
    if module.get_parameter("weight").numel() != elements:
        raise ValueError(f"{name} has a weight of {module.get_parameter('weight').shape} but is {shape} in the base")
    return module
