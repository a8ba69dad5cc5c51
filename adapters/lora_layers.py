"""Gives the linears of a resident base model their pools and their delta, without touching a base weight.

A linear is served by swapping its class for a generated subclass: names in state_dict, isinstance, tied weights and
quantised subclasses stay as they are, and a step without adapters costs one attribute check a module. All modules of a
model read one `Step`, set for the length of a forward pass; those that read one input share one operation
(lora_group.py). Knows nothing of requests, versions or eviction: row ranges come from outside.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from adapters.adapter_ref import AdapterVersion
from adapters.host_memory import HostMemory
from adapters.lora_group import STATE, GroupLoRA, LoRALinear, ModuleLoRA, Step
from adapters.lora_model import LoRAModel
from adapters.module_names import BaseModules, LinearShape
from adapters.ops import LoRAOps, LoRAPools
from adapters.packed_modules import PackedLayout, PackedModules
from adapters.pool_places import PoolPlaces, pool_places


class LoRALayers:
    """All linears of `base` in `model`, swapped, with pools of `num_rows` rows each in the module's own dtype."""

    def __init__(self, model: nn.Module, base: BaseModules, *, num_rows: int, ops: LoRAOps) -> None:
        if num_rows < 1:
            raise ValueError(f"LoRA pools of {num_rows} rows hold no adapter: raise the memory for LoRA")
        linears = {name: _linear(model, name, shape) for name, shape in base.linears.items()}
        self.num_rows = num_rows
        self.ops = ops
        self._shapes = base.linears
        self._memory = HostMemory()
        self._step = Step()
        self._written: dict[int, LoRAModel] = {}  # first row → the adapter whose numbers stand there
        device = next(iter(linears.values())).get_parameter("weight").device
        self._ranks = torch.zeros(len(linears), num_rows, dtype=torch.int32, device=device)  # those of all groups
        self._places: WeakKeyDictionary[PackedLayout, PoolPlaces] = WeakKeyDictionary()
        self._groups: list[GroupLoRA] = []
        self._modules: dict[str, ModuleLoRA] = {}  # in the order of `_ranks`
        for names in _all_groups(base):
            group = self._group([linears[name] for name in names], names, ops)
            self._groups.append(group)
            for index, name in enumerate(names):
                self._modules[name] = ModuleLoRA(group, index, _own_forward(linears[name]))
        for name, linear in linears.items():  # nothing can fail from here on, so no model is left half swapped
            linear.__dict__.pop("forward", None)
            linear.__dict__[STATE] = self._modules[name]
            linear.__class__ = _lora_class(type(linear))  # type: ignore[arg-type]  # mypy doubts that classes hash

    @staticmethod
    def bytes_per_row(base: BaseModules, dtype: torch.dtype) -> int:
        """Pool bytes that one rank of an adapter takes over all modules."""
        return sum(shape.in_features + shape.out_features for shape in base.linears.values()) * dtype.itemsize

    @property
    def pools(self) -> list[Tensor]:
        """All A and B pools."""
        return [pool for group in self._groups for pool in (group.pools.a_pool, *group.pools.b_pools)]

    def write(self, start: int, model: LoRAModel) -> None:
        """Copy an adapter into rows [start, start + its rank) of every module's pools, over whatever was there.

        ValueError, and nothing written, when a module is not one of the base's, a shape differs, or the rows end
        beyond the pools.
        """
        packed = PackedModules.of(model.modules)
        places = self._places_of(packed.layout, model.version)
        if start < 0 or start + model.lora_rank > self.num_rows:
            raise ValueError(f"rows [{start}, {start + model.lora_rank}) are outside pools of {self.num_rows} rows")
        self.clear(start, model.lora_rank)
        places.writer.write(packed.flat, start)
        self._written[start] = model  # after the copies: rows half written belong to nobody
        self._ranks[:, start] = places.ranks
        for group, num_targeted in places.num_targeted.items():
            group.targeted[start] = num_targeted

    def version_at(self, start: int) -> AdapterVersion | None:
        """Whose numbers begin at pool row `start`; None when nobody's do."""
        model = self._written.get(start)
        return None if model is None else model.version

    def clear(self, start: int, length: int) -> None:
        """Forget every adapter that has a row in [start, start + length). Its numbers stay but are not read again."""
        end = start + length
        for first in [f for f, model in self._written.items() if f < end and start < f + model.lora_rank]:
            self._ranks[:, first] = 0
            for group in self._groups:
                group.clear(first)
            del self._written[first]

    @contextmanager
    def applying(self, batch: Any, *, everywhere: bool = False) -> Iterator[None]:
        """Apply `batch`, as `ops.stage` gave it, in the forward passes inside; None = base rows only. RuntimeError when
        nested.

        `everywhere` runs the operation in linears that no adapter targets, too: what is recorded for replay must serve
        adapters that come later.
        """
        if self._step.is_running:
            raise RuntimeError("a LoRA batch is already being applied to this model")
        step = self._step
        step.is_running, step.batch, step.everywhere = True, batch, everywhere
        try:
            yield
        finally:
            step.is_running, step.batch, step.everywhere = False, None, False
            for group in self._groups:
                group.outputs.forget()

    def check_integrity(self) -> None:
        """Ranges are disjoint and inside the pools; a module has ranks only where an adapter starts."""
        end = 0
        for start, model in sorted(self._written.items()):
            assert start >= end, f"row {start} belongs to two adapters"
            end = start + model.lora_rank
        assert end <= self.num_rows, f"an adapter ends at row {end} of {self.num_rows}"
        for name, module in self._modules.items():
            ranks = module.group.pools.ranks[module.index]  # [num_rows]
            for start in ranks.nonzero().flatten().tolist():
                assert start in self._written, f"{name} has a rank at row {start}, where no adapter begins"
                assert ranks[start] <= self._written[start].lora_rank, f"{name} has a rank too wide at row {start}"
        for group in self._groups:
            counts = group.pools.ranks.count_nonzero(dim=0).tolist()  # [num_rows] linears with a rank
            counted = {start: count for start, count in enumerate(counts) if count}
            assert group.targeted == counted, f"a group counts {group.targeted} where its pools say {counted}"

    def _places_of(self, layout: PackedLayout, version: AdapterVersion) -> PoolPlaces:
        """ValueError when a module is not one of the base's or has another shape."""
        places = self._places.get(layout)
        if places is None:
            for name, place in layout.places.items():
                shape = self._shapes.get(name)
                if shape is None:
                    raise ValueError(f"version {version} targets {name}, which is not a linear of the base")
                if (place.in_features, place.out_features) != (shape.in_features, shape.out_features):
                    raise ValueError(f"version {version} has {place} at {name}, a module of {shape}")
            places = self._places[layout] = pool_places(layout, self._modules, self.ops)
        return places

    def _group(self, linears: Sequence[nn.Module], names: Sequence[str], ops: LoRAOps) -> GroupLoRA:
        weight = linears[0].get_parameter("weight")
        in_features = self._shapes[names[0]].in_features

        def empty(*shape: int) -> Tensor:  # not zeros: no row is read before it is written
            if weight.device.type == "cpu":
                return self._memory.empty(*shape, dtype=weight.dtype)
            return torch.empty(shape, dtype=weight.dtype, device=weight.device)

        first = len(self._modules)
        pools = LoRAPools(
            a_pool=empty(len(names), self.num_rows, in_features),
            b_pools=tuple(empty(self.num_rows, self._shapes[name].out_features) for name in names),
            ranks=self._ranks[first : first + len(names)],
        )
        return GroupLoRA(self._step, pools, ops.bind(pools), [_own_forward(linear) for linear in linears])


def _all_groups(base: BaseModules) -> list[tuple[str, ...]]:
    """The groups of `base`, and every other linear as a group of its own."""
    grouped = {name for names in base.groups for name in names}
    return [*base.groups, *((name,) for name in base.linears if name not in grouped)]


def _own_forward(linear: nn.Module) -> Any:
    """The forward of a linear not yet swapped: its class's, or one hung on the instance by someone else."""
    return linear.__dict__.get("forward") or type(linear).forward.__get__(linear)


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
