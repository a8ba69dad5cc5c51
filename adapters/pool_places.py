"""Where the modules of one packed layout go in the pools. Made once for all adapters of a layout; copies nothing."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.lora_group import GroupLoRA, ModuleLoRA
from adapters.ops import LoRAOps, RowTarget, RowWriter
from adapters.packed_modules import PackedLayout


@dataclass(frozen=True, slots=True)
class PoolPlaces:
    writer: RowWriter
    ranks: Tensor  # int32 [num_linears], in the order of the model's groups
    num_targeted: Mapping[GroupLoRA, int]  # linears of a group with a rank; groups without are left out


def pool_places(layout: PackedLayout, modules: Mapping[str, ModuleLoRA], ops: LoRAOps) -> PoolPlaces:
    """`modules` are all linears that have pools, in the order of their groups; what else is in `layout` is left out."""
    targets: list[RowTarget] = []
    num_targeted: dict[GroupLoRA, int] = {}
    for name, place in layout.places.items():
        module = modules.get(name)
        if module is None:
            continue
        group, index = module.group, module.index
        if place.lora_rank > 0:
            targets.append(RowTarget(group.pools.a_pool[index], place.a_begin, place.lora_rank))
            targets.append(RowTarget(group.pools.b_pools[index], place.b_begin, place.lora_rank))
            num_targeted[group] = num_targeted.get(group, 0) + 1
    ranks = [layout.places[name].lora_rank if name in layout.places else 0 for name in modules]
    device = next(iter(modules.values())).group.pools.ranks.device
    return PoolPlaces(ops.row_writer(targets), torch.tensor(ranks, dtype=torch.int32, device=device), num_targeted)
