"""Gives the linears of a resident base model their pools and their delta, without touching a base weight.

A linear is served by swapping its class for a generated subclass (class_swap.py), and a step without adapters costs one
attribute check a module. All modules of a model read one `Step`, set for the length of a forward pass; those that read
one input share one operation (lora_group.py). What adapters change beside linears' deltas is in extra_layers.py. Knows
nothing of requests, versions or eviction: row ranges come from outside.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from adapters.adapter_ref import AdapterVersion
from adapters.applied_extras import AppliedExtras, applied
from adapters.class_swap import own_forward, swap
from adapters.device_sizes import DeviceSizes
from adapters.extra_layers import ExtraLayers
from adapters.host_memory import HostMemory
from adapters.lora_group import GroupLoRA, LoRALinear, ModuleLoRA
from adapters.lora_model import LoRAModel
from adapters.lora_step import Step
from adapters.module_names import BaseModules, LinearShape
from adapters.ops import LoRAOps, LoRAPools, select_affine
from adapters.packed_modules import PackedLayout, PackedModules
from adapters.pool_places import PoolPlaces, pool_places
from adapters.staged_extras import StagedExtras


class LoRALayers:
    """All linears of `base` in `model`, swapped, with pools of `num_rows` rows each in the module's own dtype."""

    def __init__(self, model: nn.Module, base: BaseModules, *, num_rows: int, ops: LoRAOps) -> None:
        if num_rows < 1:
            raise ValueError(f"LoRA pools of {num_rows} rows hold no adapter: raise the memory for LoRA")
        self._shapes = pooled_linears(base)
        linears = {name: _linear(model, name, shape) for name, shape in self._shapes.items()}
        self.num_rows = num_rows
        self.ops = ops
        self._model, self._base = model, base
        self._memory = HostMemory()
        self._step = Step()
        self._written: dict[int, _Written] = {}  # first row → the adapter whose numbers stand there
        device = next(iter(linears.values())).get_parameter("weight").device
        self.sizes = DeviceSizes(frozenset(self._shapes), has_own_memory=device.type != "cpu")
        self._ranks = torch.zeros(len(linears), num_rows, dtype=torch.int32, device=device)  # those of all groups
        self._places: WeakKeyDictionary[PackedLayout, PoolPlaces] = WeakKeyDictionary()
        self.extras = ExtraLayers(model, base, self._step, list(linears), num_rows, select_affine(device))
        self._groups: list[GroupLoRA] = []
        self._modules: dict[str, ModuleLoRA] = {}  # in the order of `_ranks`
        for names in _all_groups(base, self._shapes):
            group = self._group([linears[name] for name in names], names, ops)
            self._groups.append(group)
            for index, name in enumerate(names):
                self._modules[name] = ModuleLoRA(group, index, own_forward(linears[name]))
        for name, linear in linears.items():  # nothing can fail from here on, so no model is left half swapped
            swap(linear, LoRALinear, self._modules[name])
        self.extras.swap()

    @staticmethod
    def bytes_per_row(base: BaseModules, dtype: torch.dtype) -> int:
        """Pool bytes that one rank of an adapter takes over all modules."""
        return sum(shape.in_features + shape.out_features for shape in pooled_linears(base).values()) * dtype.itemsize

    @property
    def pools(self) -> list[Tensor]:
        """All A and B pools."""
        return [pool for group in self._groups for pool in (group.pools.a_pool, *group.pools.b_pools)]

    def applied(self, model: LoRAModel) -> AppliedExtras | None:
        """What `write` is to be given for an adapter, beside itself. ValueError when it does not fit the base."""
        return applied(model, self._model, self._base)

    def write(self, start: int, model: LoRAModel, extras: AppliedExtras | None = None) -> None:
        """Copy an adapter into the rows of every module's pools from `start` on, as many as `sizes` says, over whatever
        was there.

        `extras` is what `applied` gave for it, which is asked where it is None. ValueError, and nothing written, when a
        module is not one of the base's, a shape differs, or the rows end beyond the pools.
        """
        packed = PackedModules.of(model.modules)
        places = self._places_of(packed.layout, model.version)
        num_rows = self.sizes.need_of(model).num_rows
        if start < 0 or start + num_rows > self.num_rows:
            raise ValueError(f"rows [{start}, {start + num_rows}) are outside pools of {self.num_rows} rows")
        extras = extras or self.applied(model)
        self.clear(start, num_rows)
        places.writer.write(packed.flat, start)
        if extras is not None:
            self.extras.write(start, extras)
        self._written[start] = _Written(model, num_rows)  # after the copies: rows half written belong to nobody
        self._ranks[:, start] = places.ranks
        for group, num_targeted in places.num_targeted.items():
            group.targeted[start] = num_targeted

    def version_at(self, start: int) -> AdapterVersion | None:
        """Whose numbers begin at pool row `start`; None when nobody's do."""
        written = self._written.get(start)
        return None if written is None else written.model.version

    def clear(self, start: int, length: int) -> None:
        """Forget every adapter that has a row in [start, start + length). Its numbers stay but are not read again."""
        end = start + length
        for first in [f for f, written in self._written.items() if f < end and start < f + written.num_rows]:
            self._ranks[:, first] = 0
            self.extras.clear(first)
            for group in self._groups:
                group.clear(first)
            del self._written[first]

    @contextmanager
    def applying(self, batch: Any, *, extras: StagedExtras | None = None, everywhere: bool = False) -> Iterator[None]:
        """Apply `batch`, as `ops.stage` gave it, and `extras`, as `self.extras.stage` did, in the forward passes
        inside; None = base rows only, and no extras. RuntimeError when nested.

        `everywhere` runs the operation in linears that no adapter targets, too: what is recorded for replay must serve
        adapters that come later.
        """
        if self._step.is_running:
            raise RuntimeError("a LoRA batch is already being applied to this model")
        step = self._step
        step.is_running, step.batch, step.extras, step.everywhere = True, batch, extras, everywhere
        try:
            yield
        finally:
            step.is_running, step.batch, step.extras, step.everywhere = False, None, None, False
            for group in self._groups:
                group.outputs.forget()

    def check_integrity(self) -> None:
        """Ranges are disjoint and inside the pools; a module has ranks only where an adapter starts."""
        end = 0
        for start, written in sorted(self._written.items()):
            assert start >= end, f"row {start} belongs to two adapters"
            end = start + written.num_rows
        assert end <= self.num_rows, f"an adapter ends at row {end} of {self.num_rows}"
        for name, module in self._modules.items():
            ranks = module.group.pools.ranks[module.index]  # [num_rows]
            for start in ranks.nonzero().flatten().tolist():
                assert start in self._written, f"{name} has a rank at row {start}, where no adapter begins"
                assert ranks[start] <= self._written[start].num_rows, f"{name} has a rank too wide at row {start}"
        for group in self._groups:
            counts = group.pools.ranks.count_nonzero(dim=0).tolist()  # [num_rows] linears with a rank
            counted = {start: count for start, count in enumerate(counts) if count}
            assert group.targeted == counted, f"a group counts {group.targeted} where its pools say {counted}"
        self.extras.check_integrity()
        strangers = self.extras.starts - self._written.keys()
        assert not strangers, f"extras are applied at rows {strangers}, where no adapter begins"

    def _places_of(self, layout: PackedLayout, version: AdapterVersion) -> PoolPlaces:
        """ValueError when a module is not one of the base's or has another shape."""
        places = self._places.get(layout)
        if places is None:
            hosted = {*self._base.routers, *([self._base.head.name] if self._base.head else [])}  # they have no pools
            for name, place in layout.places.items():
                if name in hosted:
                    continue
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
        forwards = [own_forward(linear) for linear in linears]
        extras = self.extras.bind_group(names, pools.out_features, forwards)
        return GroupLoRA(self._step, pools, ops.bind(pools), extras, forwards)


@dataclass(frozen=True, slots=True)
class _Written:
    model: LoRAModel
    num_rows: int


def pooled_linears(base: BaseModules) -> Mapping[str, LinearShape]:
    """The linears that have pools: all but the head, whose wide B would cost every adapter as much."""
    head = None if base.head is None else base.head.name
    return {name: shape for name, shape in base.linears.items() if name != head}


def _all_groups(base: BaseModules, pooled: Mapping[str, LinearShape]) -> list[tuple[str, ...]]:
    """The groups of `base`, and every other linear as a group of its own."""
    groups = [tuple(name for name in names if name in pooled) for names in base.groups]
    grouped = {name for names in groups for name in names}
    return [*filter(None, groups), *((name,) for name in pooled if name not in grouped)]


def _linear(model: nn.Module, name: str, shape: LinearShape) -> nn.Module:
    """The module `name`, checked to have the shape `base` says and not to be swapped yet."""
    module = model.get_submodule(name)
    if isinstance(module, LoRALinear):
        raise ValueError(f"{name} has LoRA layers already: one LoRALayers per model, one name per module")
    elements = shape.in_features * shape.out_features
    if module.get_parameter("weight").numel() != elements:
        raise ValueError(f"{name} has a weight of {module.get_parameter('weight').shape} but is {shape} in the base")
    return module
