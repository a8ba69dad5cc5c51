"""One flat tensor an adapter: views equal to what was put there, equal layouts shared, no other tensor kept."""

import gc
from pathlib import Path
from weakref import ref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from adapters.checkpoint import CheckpointLimits, LoadedAdapter, load_lora_model
from adapters.module_names import BaseModules, LinearShape
from adapters.packed_modules import PackedModules, layout_of
from tests.adapters.hostile import WEIGHTS, draft

LIMITS = CheckpointLimits(max_lora_rank=64, max_adapter_bytes=1 << 28)
NUM_LAYERS = 3
SIZES = st.integers(1, 9)


@pytest.fixture(scope="module")
def base() -> BaseModules:
    shapes = {"q_proj": LinearShape(12, 20), "v_proj": LinearShape(12, 4), "down_proj": LinearShape(20, 12)}
    return BaseModules("tiny", {f"model.layers.{i}.{kind}": s for i in range(NUM_LAYERS) for kind, s in shapes.items()})


def load(folder: Path, base: BaseModules, *, r: int = 4, seed: int = 0, num_modules: int = 9) -> LoadedAdapter:
    draft(folder, base, r=r, seed=seed, num_modules=num_modules).write()
    return load_lora_model(folder, base, limits=LIMITS, dtype=torch.bfloat16)


def packed(loaded: LoadedAdapter) -> PackedModules:
    modules = loaded.model.modules
    assert isinstance(modules, PackedModules)
    return modules


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(SIZES, SIZES, SIZES), max_size=12), st.sampled_from([1, 32, 64]))
def test_places_are_apart_and_aligned(shapes: list[tuple[int, int, int]], align: int) -> None:
    layout = layout_of(((f"m{number}", *shape) for number, shape in enumerate(shapes)), align=align)
    modules = PackedModules(layout, torch.full((layout.num_elements,), -1.0))
    for number, weights in enumerate(modules.values()):
        weights.lora_a.fill_(2 * number)
        weights.lora_b.fill_(2 * number + 1)
    assert list(modules) == [f"m{number}" for number in range(len(shapes))] and len(modules) == len(shapes)
    for number, (rank, in_features, out_features) in enumerate(shapes):
        weights = modules[f"m{number}"]
        assert weights.lora_a.tolist() == [[2 * number] * in_features] * rank
        assert weights.lora_b.tolist() == [[2 * number + 1] * out_features] * rank
        offsets = [weights.lora_a.storage_offset(), weights.lora_b.storage_offset()]
        assert not any(offset % align for offset in offsets)
    assert int((modules.flat >= 0).sum()) == sum(r * (i + o) for r, i, o in shapes)


def test_a_flat_tensor_inside_a_larger_one_is_not_left() -> None:
    layout = layout_of([("m", 2, 3, 1)], align=1)
    memory = torch.zeros(20)
    modules = PackedModules(layout, memory[5:13])
    modules["m"].lora_a.fill_(1)
    modules["m"].lora_b.fill_(2)
    assert memory.tolist() == [0] * 5 + [1] * 6 + [2] * 2 + [0] * 7


@pytest.mark.parametrize("flat", [torch.zeros(7), torch.zeros(9), torch.zeros(2, 4), torch.zeros(16)[::2]])
def test_a_tensor_that_is_not_the_layouts_is_refused(flat: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="a layout of 8 elements"):
        PackedModules(layout_of([("m", 2, 3, 1)], align=1), flat)


def test_what_is_not_there_is_not_there() -> None:
    layout = layout_of([("m", 2, 3, 1)], align=1)
    modules = PackedModules(layout, torch.zeros(8))
    assert "m" in modules and "n" not in modules and modules.get("n") is None
    with pytest.raises(KeyError):
        modules["n"]


def test_equal_layouts_are_one_and_others_are_not(tmp_path: Path, base: BaseModules) -> None:
    first, same = load(tmp_path / "a", base), load(tmp_path / "b", base, seed=1)
    assert packed(first).layout is packed(same).layout and first.model.version != same.model.version
    others = [load(tmp_path / "c", base, r=2), load(tmp_path / "d", base, num_modules=5)]
    assert len({id(packed(loaded).layout) for loaded in (first, *others)}) == 3


def test_a_layout_goes_with_its_last_adapter() -> None:
    layout = layout_of([("gone", 2, 3, 1)], align=1)
    assert layout_of([("gone", 2, 3, 1)], align=1) is layout
    forgotten = ref(layout)
    del layout
    assert forgotten() is None


def test_names_are_the_bases_own_strings(tmp_path: Path, base: BaseModules) -> None:
    own = {id(name) for name in base.linears}
    names = list(packed(load(tmp_path / "a", base)))
    assert len(names) == 9 and all(id(name) in own for name in names)


def test_adapters_of_one_layout_keep_their_own_numbers(tmp_path: Path, base: BaseModules) -> None:
    loaded = {seed: load(tmp_path / str(seed), base, seed=seed) for seed in range(3)}
    for seed, adapter in loaded.items():
        tensors = load_file(tmp_path / str(seed) / WEIGHTS)
        for name, weights in adapter.model.modules.items():
            a, b = (tensors[f"base_model.model.{name}.lora_{half}.weight"] for half in "AB")
            scale = 2.0  # lora_alpha 8 at r 4
            assert torch.equal(weights.lora_a, a.bfloat16())
            assert torch.equal(weights.lora_b, (b * scale).T.bfloat16())


def test_views_outlive_their_adapter(tmp_path: Path, base: BaseModules) -> None:
    adapter = load(tmp_path / "a", base)
    weights = [adapter.model.modules[name] for name in adapter.model.modules]
    before = [(w.lora_a.clone(), w.lora_b.clone()) for w in weights]
    del adapter
    others = [load(tmp_path / f"b{seed}", base, seed=seed) for seed in range(1, 6)]
    assert len(others) == 5
    for kept, (a, b) in zip(weights, before, strict=True):
        assert torch.equal(kept.lora_a, a) and torch.equal(kept.lora_b, b)


def test_no_tensor_is_kept_for_each_module(tmp_path: Path, base: BaseModules) -> None:
    def num_tensors() -> int:
        gc.collect()
        return sum(issubclass(type(kept), torch.Tensor) for kept in gc.get_objects())

    load(tmp_path / "first", base)
    before = num_tensors()
    adapters = [load(tmp_path / str(seed), base, seed=seed) for seed in range(4)]
    assert num_tensors() - before <= 2 * len(adapters)  # of each the flat one, and the mapping it is a view of
