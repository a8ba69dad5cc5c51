"""Bytes of what adapters have besides pairs: counted to the byte, held within a limit on a device of its own memory."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch

from adapters import ops
from adapters.adapter_facts import AdapterFacts, check_device_room
from adapters.adapter_ref import AdapterUse, AdapterVersion
from adapters.device_room import DeviceNeed, DeviceRoom
from adapters.errors import AdapterCapacity
from adapters.host_cache import HostCache
from adapters.lora_layers import LoRALayers
from adapters.lora_model import LoRAModel, LoRAWeights
from adapters.residency import AdapterResidency
from adapters.row_range_pool import RowRangePool
from tests.adapters.drawn_extras import KINDS, Draw, parts_of
from tests.adapters.test_extra_layers import tied

META = torch.device("meta")


class World:
    """A llama whose layers count as those of a GPU do."""

    def __init__(self) -> None:
        self.stock = tied("llama")
        self.base = parts_of(self.stock)
        cpu = torch.device("cpu")
        self.layers = LoRALayers(copy.deepcopy(self.stock), self.base, num_rows=64, ops=ops.select(cpu))
        self.cpu_sizes, self.layers.sizes = self.layers.sizes, replace(self.layers.sizes, has_own_memory=True)

    def drawn(self, kind: str) -> LoRAModel:
        return KINDS[kind](Draw(self.stock, self.base, list(KINDS).index(kind)))

    def need(self, kind: str) -> DeviceNeed:
        return self.layers.sizes.need_of(self.drawn(kind))

    def residency(self, max_extra_bytes: int) -> AdapterResidency:
        return AdapterResidency(HostCache(1 << 30), RowRangePool(64, max_extra_bytes=max_extra_bytes), self.layers)


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def storages(value: Any) -> dict[int, int]:
    """Every piece of memory behind the tensors of a dataclass, and its bytes."""
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        return {storage._cdata: storage.nbytes()}
    parts: Sequence[Any] = []
    if isinstance(value, Mapping):
        parts = [*value.values()]
    elif is_dataclass(value):
        parts = [getattr(value, each.name) for each in fields(value)]
    return {place: size for part in parts for place, size in storages(part).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_that_are_copied_to_the_device(world: World, kind: str) -> None:
    applied = world.layers.applied(world.drawn(kind))
    on_device = 0 if applied is None else sum(storages(applied.to_device(META)).values())
    assert world.need(kind).num_extra_bytes == on_device
    assert (on_device > 0) is (kind != "plain")
    assert world.cpu_sizes.need_of(world.drawn(kind)) == DeviceNeed(num_rows=world.need(kind).num_rows)


def test_a_norm_that_is_computed_anew_takes_no_more_than_is_counted(world: World) -> None:
    drawn = world.drawn("norms")
    with torch.no_grad():
        for name in world.base.norms:  # 0 somewhere: its output does not tell what it was given
            world.layers._model.get_submodule(name).get_parameter("weight")[0] = 0
    try:
        applied = world.layers.applied(drawn)
    finally:
        world.layers._model.load_state_dict(world.stock.state_dict(), strict=False)
    assert applied is not None and applied.exact_norms and not applied.affines
    assert 0 < sum(storages(applied.to_device(META)).values()) <= world.need("norms").num_extra_bytes


@pytest.mark.parametrize("kind", ["dora", "ia3", "norms", "head_bias"])
def test_host_memory_counts_the_vectors_that_are_made(world: World, kind: str) -> None:
    drawn = world.drawn(kind)
    applied = world.layers.applied(drawn)
    assert applied is not None
    held = storages(drawn.modules) | storages(drawn.extras)
    made = {place: size for place, size in storages(applied).items() if place not in held}
    assert made and drawn.num_bytes == sum(held.values()) + sum(made.values())


def uses(model: LoRAModel) -> tuple[AdapterUse, ...]:
    return (AdapterUse(model.version),)


def test_an_adapter_that_can_never_fit_is_refused_at_load(world: World) -> None:
    drawn, num_bytes = world.drawn("full_copies"), world.need("full_copies").num_extra_bytes
    found = world.residency(num_bytes - 1)
    with pytest.raises(AdapterCapacity, match=f"{num_bytes} bytes .* over lora_extras_memory={num_bytes - 1}.*restart"):
        found.load(drawn)
    assert drawn.version not in found.host
    found.check_integrity()


def test_one_without_pairs_does_not_cost_a_row_alone(world: World) -> None:
    """Two that fit one by one and not together: the second waits in a step of both, and evicts the first after it;
    what the first had on the device is given back before the second comes."""
    first, second, plain = (world.drawn(kind) for kind in ("trained_rows", "full_copies", "plain"))
    room = world.need("full_copies").num_extra_bytes
    found = world.residency(room)
    for model in (first, second, plain):
        found.load(model)
    assert found.pin(uses(first)) and found.pin(uses(plain)) and not found.pin(uses(second))
    found.activate()
    found.check_integrity()
    ((start, _),) = found.row_ranges(uses(first))
    assert world.layers.extras.starts == {start} and 0 < found.pool.num_extra_bytes < room
    found.begin_step()
    assert found.pin(uses(second))
    found.activate()
    found.check_integrity()
    ((moved, _),) = found.row_ranges(uses(second))
    assert found.active_versions == (plain.version, second.version) and found.pool.num_evictions == 1
    assert world.layers.extras.starts == {moved} and found.pool.num_extra_bytes == room
    for model in (first, second, plain):
        found.unload(model.version)
    found.check_integrity()
    assert not world.layers.extras.starts and found.pool.num_extra_bytes == 0


def test_an_adapter_that_moves_is_not_held_twice(world: World) -> None:
    """Rows moved together: its extras go to the new place and leave the old one."""
    found = AdapterResidency(HostCache(1 << 30), RowRangePool(12, max_extra_bytes=1 << 30), world.layers)
    first, dora = world.drawn("plain"), world.drawn("dora")
    wide = world.drawn("plain")
    modules = {
        name: LoRAWeights(*(torch.cat([t, t]) for t in (w.lora_a, w.lora_b))) for name, w in wide.modules.items()
    }
    wide = LoRAModel(AdapterVersion("wide"), modules)
    for model in (first, dora, wide):
        found.load(model)
    assert found.pin(uses(first)) and found.pin(uses(dora))
    found.activate()
    assert found.row_ranges(uses(dora))[0][0] == world.layers.sizes.need_of(first).num_rows == 4
    found.unload(first.version)
    found.begin_step()
    assert found.pin(uses(dora)) and found.pin(uses(wide)), "four rows on each side of dora's, and eight wanted"
    found.activate()
    found.check_integrity()
    assert found.row_ranges(uses(dora))[0][0] != 4
    assert world.layers.extras.starts == {found.row_ranges(uses(dora))[0][0]}
    for model in (dora, wide):
        found.unload(model.version)


def test_adapters_that_never_fit_together_are_refused_before_admission() -> None:
    names = [AdapterVersion("a"), AdapterVersion("b")]
    facts = {name: AdapterFacts(need=DeviceNeed(num_extra_bytes=6)) for name in names}
    each = [AdapterUse(name) for name in names]
    check_device_room(each, facts, DeviceRoom(num_rows=2, max_extra_bytes=12))
    check_device_room(each, facts, DeviceRoom(num_rows=2))
    with pytest.raises(AdapterCapacity, match="12 bytes .* over lora_extras_memory=11; name fewer"):
        check_device_room(each, facts, DeviceRoom(num_rows=2, max_extra_bytes=11))
