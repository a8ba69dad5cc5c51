"""Host memory, row ranges and pools together: under churn the pools hold what was loaded, and no byte of padding."""

from itertools import pairwise
from random import Random

import pytest
import torch
from torch import Tensor, nn

from adapters import ops
from adapters.adapter_ref import AdapterUse, AdapterVersion
from adapters.host_cache import HostCache
from adapters.lora_layers import LoRALayers
from adapters.lora_model import LoRAModel, LoRAWeights
from adapters.module_names import BaseModules, LinearShape
from adapters.ops.row_writer import CPURowWriter
from adapters.packed_modules import PackedModules
from adapters.residency import AdapterResidency
from adapters.row_range_pool import RowRangePool

SHAPES = {"first": LinearShape(24, 40), "second": LinearShape(40, 8), "third": LinearShape(8, 16)}
RANKS = (8, 16, 32, 64)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            setattr(self, name, nn.Linear(shape.in_features, shape.out_features, dtype=torch.bfloat16))


def adapter(number: int, rank: int, *names: str) -> LoRAModel:
    """Of random numbers; the last module has half the rank when there are several."""
    generator = torch.Generator().manual_seed(number)

    def draw(rank: int, features: int) -> Tensor:
        return torch.randn(rank, features, generator=generator).bfloat16()

    weights = {}
    for name in names or SHAPES:
        r = rank // 2 if names and name == names[-1] and len(names) > 1 else rank
        weights[name] = LoRAWeights(draw(r, SHAPES[name].in_features), draw(r, SHAPES[name].out_features))
    return LoRAModel(AdapterVersion(f"v{number}"), PackedModules.of(weights))


def residency(num_rows: int, models: list[LoRAModel]) -> AdapterResidency:
    layers = LoRALayers(Net(), BaseModules("net", SHAPES), num_rows=num_rows, ops=ops.select(torch.device("cpu")))
    found = AdapterResidency(HostCache(max_bytes=1 << 30), RowRangePool(num_rows), layers)
    for model in models:
        found.load(model)
    return found


def step(found: AdapterResidency, models: list[LoRAModel]) -> list[LoRAModel]:
    """Pin and activate as many of `models` as fit; those."""
    found.begin_step([model.version for model in models])
    pinned = [model for model in models if found.pin((AdapterUse(model.version),))]
    for model in pinned:
        found.count_use((AdapterUse(model.version),))
    found.activate()
    return pinned


def rows_of(found: AdapterResidency, model: LoRAModel) -> dict[str, LoRAWeights]:
    """What the kernels would read for it."""
    ((start, _),) = found.row_ranges((AdapterUse(model.version),))
    read = {}
    for name, module in found.layers._modules.items():
        pools = module.group.pools
        end = start + int(pools.ranks[module.index, start])
        read[name] = LoRAWeights(pools.a_pool[module.index, start:end], pools.b_pools[module.index][start:end])
    return read


def assert_in_place(found: AdapterResidency, model: LoRAModel) -> None:
    for name, read in rows_of(found, model).items():
        wanted = model.modules.get(name)
        if wanted is None:
            assert read.lora_rank == 0, f"{model.version} has ranks in {name}, which it does not target"
        else:
            assert torch.equal(read.lora_a, wanted.lora_a) and torch.equal(read.lora_b, wanted.lora_b)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_was_evicted_or_moved_each_adapter_reads_its_own_numbers(seed: int) -> None:
    random = Random(seed)
    targets = [(), ("first",), ("first", "third"), ("second", "third")]
    models = [adapter(i, RANKS[i % 4], *targets[i // 4 % 4]) for i in range(32)]
    found = residency(160, models)
    for _ in range(60):
        for model in step(found, random.sample(models, random.randint(1, 8))):
            assert_in_place(found, model)
        if random.random() < 0.2:
            gone = random.choice(models)
            found.unload(gone.version)
            found.load(gone)
        found.check_integrity()
    assert found.pool.num_evictions > 50 and found.num_activations > found.pool.num_evictions


@pytest.mark.parametrize("seed", range(3))
def test_pool_bytes_are_the_adapters_bytes(seed: int) -> None:
    """Ranks 8 to 64 mixed: what a full step uses of the pools is 95 % or more of their bytes, by counting both."""
    random = Random(seed)
    models = [adapter(i, RANKS[i % 4]) for i in range(64)]
    found = residency(512, models)
    pool_bytes = sum(pool.nbytes for pool in found.layers.pools)
    for _ in range(30):
        useful = sum(model.num_bytes for model in step(found, random.sample(models, 40)))
        assert pool_bytes <= 1.05 * useful


def test_a_failed_write_leaves_its_rows_free_and_the_others_as_they_were() -> None:
    stays, fails = adapter(0, 8), adapter(1, 16)
    found = residency(32, [stays, fails])
    step(found, [stays])

    def fail(writer: CPURowWriter, flat: Tensor, start: int) -> None:
        raise MemoryError("planted")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CPURowWriter, "write", fail)
        with pytest.raises(MemoryError):
            step(found, [stays, fails])
    found.check_integrity()
    assert found.active_versions == (stays.version,) and found.pool.num_free_rows == 24
    assert_in_place(found, stays)
    step(found, [fails])
    assert_in_place(found, fails)


def test_ranges_are_read_only_once_written() -> None:
    model = adapter(0, 8)
    found = residency(16, [model])
    assert found.pin((AdapterUse(model.version),))
    with pytest.raises(RuntimeError, match="activate after the last pin"):
        found.row_ranges((AdapterUse(model.version),))
    found.activate()
    assert found.row_ranges((AdapterUse(model.version), AdapterUse(model.version, 0.0))) == ((0, 1.0),)


def test_adapters_of_one_layout_are_placed_once() -> None:
    models = [adapter(i, 8) for i in range(4)] + [adapter(4, 8, "first")]
    found = residency(40, models)
    step(found, models)
    assert len(found.layers._places) == 2
    starts = [found.row_ranges((AdapterUse(model.version),))[0][0] for model in models]
    assert all(after - before == 8 for before, after in pairwise(starts))
