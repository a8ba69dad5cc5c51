"""Plans kept between loads: the same results, no header parsed twice, and bounds that hold."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapters import header_table
from adapters.checkpoint import CheckpointLimits, LoadedAdapter, load_lora_model
from adapters.errors import AdapterRefused, RefusalCode
from adapters.lora_config import CONFIG_NAME
from adapters.module_names import BaseModules, LinearShape
from adapters.plan_cache import PlanCache
from tests.adapters.hostile import WEIGHTS, draft, header_of, write_raw

LIMITS = CheckpointLimits(max_lora_rank=64, max_adapter_bytes=1 << 28)
BASE = BaseModules("tiny", {f"model.layers.{i}.{kind}": LinearShape(12, 20) for i in range(3) for kind in "qv"})


def load(folder: Path, plans: PlanCache | None, *, base: BaseModules = BASE, **limits: int) -> LoadedAdapter:
    chosen = CheckpointLimits(**{"max_lora_rank": 64, "max_adapter_bytes": 1 << 28} | limits)
    return load_lora_model(folder, base, limits=chosen, dtype=torch.bfloat16, plans=plans)


def made(folder: Path, *, seed: int = 0, change: Callable[[Any], None] = lambda _: None) -> Path:
    drawn = draft(folder, BASE, seed=seed, num_modules=6)
    change(drawn)
    drawn.write()
    return folder


@pytest.fixture
def parses(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files whose headers were parsed."""
    found: list[str] = []
    parse = header_table.parse_header

    def counted(header: bytes, *, data_bytes: int, what: str) -> Any:
        found.append(what)
        return parse(header, data_bytes=data_bytes, what=what)

    monkeypatch.setattr(header_table, "parse_header", counted)
    return found


def test_a_hit_parses_no_header_and_gives_what_a_load_without_plans_gives(tmp_path: Path, parses: list[str]) -> None:
    plans, folders = PlanCache(), [made(tmp_path / str(seed), seed=seed) for seed in range(3)]
    found = [load(folder, plans) for folder in folders]
    assert parses == [WEIGHTS] and len(plans) == 1
    for folder, loaded in zip(folders, found, strict=True):
        wanted = load(folder, None)
        assert loaded.model.version == wanted.model.version and loaded.report == wanted.report
        for name, weights in wanted.model.modules.items():
            assert torch.equal(loaded.model.modules[name].lora_b, weights.lora_b)
            assert torch.equal(loaded.model.modules[name].lora_a, weights.lora_a)
    assert len({loaded.model.version for loaded in found}) == 3


def test_what_targets_are_listed_in_another_order_is_the_same_plan(tmp_path: Path, parses: list[str]) -> None:
    plans = PlanCache()
    for number, listed in enumerate((["q", "v"], ["v", "q", "w"])):
        folder = made(tmp_path / str(number), change=lambda d, listed=listed: d.config.update(target_modules=listed))
        loaded = load(folder, plans)
    assert parses == [WEIGHTS] and any("lists" in warning and " w," in warning for warning in loaded.report.warnings)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.config.update(lora_alpha=9),
        lambda d: d.config.update(use_rslora=True),
        lambda d: d.tensors.update({d.first_a: d.tensors[d.first_a].astype("float16")}),
    ],
)
def test_another_meaning_is_another_plan(change: Callable[[Any], None], tmp_path: Path) -> None:
    plans = PlanCache()
    load(made(tmp_path / "a"), plans)
    other = made(tmp_path / "b", change=change)
    assert load(other, plans).model.version == load(other, None).model.version
    assert len(plans) == 2


def test_another_base_or_limit_is_judged_anew(tmp_path: Path) -> None:
    plans, folder = PlanCache(), made(tmp_path / "a")
    load(folder, plans)
    with pytest.raises(AdapterRefused) as caught:
        load(folder, plans, max_lora_rank=3)
    assert caught.value.reason is RefusalCode.TOO_LARGE
    wide = BaseModules("wide", {name: LinearShape(13, 20) for name in BASE.linears})
    with pytest.raises(AdapterRefused) as caught:
        load(folder, plans, base=wide)
    assert caught.value.reason is RefusalCode.WRONG_BASE and len(plans) == 1


def test_a_file_cut_or_grown_under_a_known_header_is_refused(tmp_path: Path) -> None:
    plans = PlanCache()
    load(made(tmp_path / "a"), plans)
    data = (made(tmp_path / "b", seed=1) / WEIGHTS).read_bytes()
    for changed in (data[:-4], data + bytes(4)):
        (tmp_path / "b" / WEIGHTS).write_bytes(changed)
        with pytest.raises(AdapterRefused) as caught:
            load(tmp_path / "b", plans)
        assert caught.value.reason is RefusalCode.CORRUPT


def test_values_that_are_not_finite_are_found_on_a_hit(tmp_path: Path) -> None:
    plans = PlanCache()
    load(made(tmp_path / "a"), plans)

    def spoil(d: Any) -> None:
        d.tensors[d.first_b][2, 1] = float("nan")

    with pytest.raises(AdapterRefused) as caught:
        load(made(tmp_path / "b", change=spoil), plans)
    assert caught.value.reason is RefusalCode.NONFINITE and "lora_B" in str(caught.value.tensor)


def test_an_index_that_moves_a_tensor_is_judged_anew(tmp_path: Path) -> None:
    plans, folder = PlanCache(), made(tmp_path / "a")
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).rename(folder / "adapter_model-1.safetensors")
    index = folder / "adapter_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "adapter_model-1.safetensors")}))
    load(folder, plans)
    some = dict.fromkeys(list(tensors)[1:], "adapter_model-1.safetensors")
    index.write_text(json.dumps({"weight_map": some}))
    with pytest.raises(AdapterRefused) as caught:
        load(folder, plans)
    assert caught.value.reason is RefusalCode.CORRUPT


def test_bounds_in_number_and_bytes(tmp_path: Path) -> None:
    one = PlanCache()
    load(made(tmp_path / "a"), one)
    few, small = PlanCache(max_plans=2), PlanCache(max_bytes=2 * one.num_bytes)
    none = PlanCache(max_bytes=one.num_bytes - 1)
    for plans, kept in ((few, 2), (small, 2), (none, 0)):
        for alpha in range(1, 6):
            folder = made(tmp_path / f"{alpha}", change=lambda d, alpha=alpha: d.config.update(lora_alpha=alpha))
            load(folder, plans)
        assert len(plans) == kept and plans.num_bytes <= kept * one.num_bytes


def test_the_version_does_not_hang_on_the_order_in_the_file_or_on_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = load(made(tmp_path / "a"), None)
    drawn = draft(tmp_path / "b", BASE, num_modules=6)
    drawn.tensors = dict(sorted(drawn.tensors.items(), key=lambda item: item[0][::-1]))
    drawn.write()
    assert list(drawn.tensors) != sorted(drawn.tensors)
    assert load(drawn.folder, None).model.version == wanted.model.version
    monkeypatch.setattr("adapters.tensor_pieces.PIECE_BYTES", 1500)
    monkeypatch.setattr("adapters.run_plan.PIECE_BYTES", 1500)
    pieces = load(drawn.folder, None)
    assert pieces.model.version == wanted.model.version
    for name, weights in wanted.model.modules.items():
        assert torch.equal(pieces.model.modules[name].lora_b, weights.lora_b)


def test_data_out_of_place_in_memory_is_read_right(tmp_path: Path) -> None:
    """float16 of an odd number of values before float32: nothing lies at a multiple of its size in the file."""
    shape = LinearShape(3, 5)
    base = BaseModules("odd", {f"model.{kind}": shape for kind in "abc"})
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for number, kind in enumerate("abc"):
        dtype = torch.float16 if number % 2 == 0 else torch.float32
        for half, size in (("A", (1, 3)), ("B", (5, 1))):
            name = f"base_model.model.model.{kind}.lora_{half}.weight"
            tensors[name] = torch.randn(*size, generator=generator).to(dtype)
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / CONFIG_NAME).write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 3}))
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    header = header_of(arrays)
    write_raw(folder / WEIGHTS, header, b"".join(array.tobytes() for array in arrays.values()))
    loaded = load_lora_model(folder, base, limits=LIMITS, dtype=torch.float32)
    for kind in "abc":
        weights, prefix = loaded.model.modules[f"model.{kind}"], f"base_model.model.model.{kind}.lora_"
        assert torch.equal(weights.lora_a, tensors[f"{prefix}A.weight"].float())
        assert torch.equal(weights.lora_b, (tensors[f"{prefix}B.weight"].float() * 3).T)
