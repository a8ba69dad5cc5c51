"""The loader against PEFT as the oracle, and against every hostile folder of the table."""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaModel

from adapters.adapter_folder import AdapterFolder
from adapters.base_walk import modules_of
from adapters.checkpoint import CheckpointLimits, LoadedAdapter, load_lora_model
from adapters.errors import AdapterNotFound, AdapterRefused, RefusalCode
from adapters.lora_config import CONFIG_NAME, LoRAConfig
from adapters.module_names import BaseModules
from adapters.name_patterns import NamePattern
from tests.adapters.hostile import HOSTILE, WEIGHTS, HostileCase, draft, healthy, write_safetensors

LIMITS = CheckpointLimits(max_lora_rank=64, max_adapter_bytes=1 << 28)
LLAMA = LlamaConfig(
    vocab_size=96, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
GPT2 = GPT2Config(vocab_size=96, n_embd=16, n_layer=2, n_head=4, n_positions=32)
QV = ["q_proj", "v_proj"]


def load(folder: Path, base: BaseModules, dtype: torch.dtype = torch.float32, **limits: int) -> LoadedAdapter:
    chosen = CheckpointLimits(
        max_lora_rank=limits.get("max_lora_rank", LIMITS.max_lora_rank),
        max_adapter_bytes=limits.get("max_adapter_bytes", LIMITS.max_adapter_bytes),
    )
    return load_lora_model(folder, base, limits=chosen, dtype=dtype)


@pytest.fixture(scope="module")
def base() -> BaseModules:
    return modules_of(LlamaForCausalLM(LLAMA))


def trained(model: nn.Module, config: LoraConfig, folder: Path) -> nn.Module:
    """A PEFT model with A and B random (B is zero at first, which would let every test pass), saved."""
    torch.manual_seed(1)
    peft_model = get_peft_model(model, config)  # type: ignore[arg-type]
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    peft_model.save_pretrained(str(folder))
    return peft_model


def peft_deltas(peft_model: nn.Module) -> dict[str, torch.Tensor]:
    """module of the base → ΔW as PEFT computes it, in the orientation of the module's own weight."""
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): module.get_delta_weight("default")
        for name, module in peft_model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": QV},
    "all_linear": {"target_modules": "all-linear"},
    "expression": {"target_modules": r".*self_attn\.(q|k)_proj"},
    "rslora": {"target_modules": QV, "use_rslora": True},
    "rank_pattern": {"target_modules": QV, "rank_pattern": {"layers.0.self_attn.q_proj": 6, "v_proj": 2}},
    "alpha_pattern": {"target_modules": QV, "alpha_pattern": {r"layers\.1\..*": 32, "q_proj": 3.5}},
    "rslora_patterns": {
        "target_modules": QV,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 3},
        "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 5},
    },
    "layers": {"target_modules": QV, "layers_to_transform": [1]},
    "orthogonal": {"target_modules": QV, "init_lora_weights": "orthogonal"},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_deltas_equal_pefts(variant: str, tmp_path: Path, base: BaseModules) -> None:
    model = trained(LlamaForCausalLM(LLAMA), LoraConfig(r=4, lora_alpha=10, **VARIANTS[variant]), tmp_path)
    check_against(peft_deltas(model), load(tmp_path, base), is_transposed=False)


@pytest.mark.parametrize("extra", [{}, {"use_rslora": True}, {"rank_pattern": {"c_attn": 6}}])
def test_gpt2_deltas_equal_pefts(extra: dict[str, Any], tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=10, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, **extra)
    model = trained(GPT2LMHeadModel(GPT2), config, tmp_path)
    check_against(peft_deltas(model), load(tmp_path, modules_of(GPT2LMHeadModel(GPT2))), is_transposed=True)


def check_against(oracle: dict[str, torch.Tensor], loaded: LoadedAdapter, *, is_transposed: bool) -> None:
    assert loaded.model.modules.keys() == oracle.keys() and oracle
    squares: dict[str, float] = {}
    for name, weights in loaded.model.modules.items():
        delta = weights.lora_b.T @ weights.lora_a  # [out, in]
        want = oracle[name].T if is_transposed else oracle[name]
        torch.testing.assert_close(delta, want, rtol=1e-5, atol=1e-6)
        assert want.abs().max() > 1e-3
        assert weights.lora_a.is_contiguous() and weights.lora_b.is_contiguous()
        kind = name.rpartition(".")[2]
        squares[kind] = squares.get(kind, 0.0) + float(want.detach().norm()) ** 2
    assert loaded.report.delta_norms == pytest.approx({kind: square**0.5 for kind, square in squares.items()}, rel=1e-4)


def test_an_adapter_of_the_headless_model_is_renamed_as_a_whole(tmp_path: Path, base: BaseModules) -> None:
    config = LoraConfig(r=4, lora_alpha=10, target_modules=QV, rank_pattern={"^layers.0.self_attn.q_proj": 2})
    model = trained(LlamaModel(LLAMA), config, tmp_path)
    loaded = load(tmp_path, base)
    assert loaded.report.features == ("rank_pattern", "renamed: * → model.*")
    check_against({f"model.{name}": d for name, d in peft_deltas(model).items()}, loaded, is_transposed=False)


def shard(folder: Path, index_name: str) -> None:
    """Split a saved adapter in two files with an index, as the Hub holds some."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    weight_map = {name: f"adapter_model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for part in set(weight_map.values()):
        save_file({name: t for name, t in tensors.items() if weight_map[name] == part}, folder / part)
    (folder / index_name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("index_name", ["adapter_model.safetensors.index.json", "model.safetensors.index.json"])
def test_a_sharded_adapter_is_the_same_version(index_name: str, tmp_path: Path, base: BaseModules) -> None:
    healthy(tmp_path / "a", base)
    whole = load(tmp_path / "a", base)
    shard(tmp_path / "a", index_name)
    parts = load(tmp_path / "a", base)
    assert parts.model.version == whole.model.version
    for name, weights in whole.model.modules.items():
        assert torch.equal(parts.model.modules[name].lora_b, weights.lora_b)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scale_is_folded_in_float32_before_the_cast(
    stored: torch.dtype, dtype: torch.dtype, tmp_path: Path, base: BaseModules
) -> None:
    d = draft(tmp_path, base)
    d.config["lora_alpha"] = 10.3
    d.write()
    tensors = {name: tensor.to(stored) for name, tensor in load_file(tmp_path / WEIGHTS).items()}
    save_file(tensors, tmp_path / WEIGHTS)
    for name, weights in load(tmp_path, base, dtype).model.modules.items():
        b = tensors[f"base_model.model.{name}.lora_B.weight"]
        assert torch.equal(weights.lora_b, (b.float() * (10.3 / 4)).to(dtype).T)
        assert torch.equal(weights.lora_a, tensors[f"base_model.model.{name}.lora_A.weight"].to(dtype))


def test_the_version_is_config_then_declarations_then_data_in_the_order_of_names(
    tmp_path: Path, base: BaseModules
) -> None:
    d = draft(tmp_path, base)
    d.write()
    config = b'{"alpha_pattern":{},"lora_alpha":8.0,"r":4,"rank_pattern":{},"use_rslora":false}'
    config = config.replace(b"{}", json.dumps(LoRAConfig(r=4, lora_alpha=8).alpha_pattern.to_json(float)).encode())
    arrays = sorted(d.tensors.items())
    declared = json.dumps([[name, "F32", list(array.shape)] for name, array in arrays], separators=(",", ":")).encode()
    data = b"".join(array.tobytes() for _, array in arrays)
    parts = (len(config).to_bytes(8, "little"), config, len(declared).to_bytes(8, "little"), declared, data)
    assert load(tmp_path, base).model.version == hashlib.sha256(b"".join(parts)).hexdigest()


def test_the_version_is_of_the_mathematics(tmp_path: Path, base: BaseModules) -> None:
    """Same bytes, same version, wherever they lie and whatever else the config says; any other bit, another."""
    first = load(healthy(tmp_path / "a", base), base).model.version
    assert len(first) == 64 and load(healthy(tmp_path / "b", base), base).model.version == first
    same = draft(tmp_path / "c", base)
    same.config |= {"lora_dropout": 0.5, "base_model_name_or_path": "elsewhere"}
    same.tensors = dict(reversed(same.tensors.items()))
    same.write()
    assert load(same.folder, base).model.version == first
    others = [draft(tmp_path / f"other{i}", base) for i in range(3)]
    others[0].config["lora_alpha"] = 9
    others[1].tensors[others[1].first_b][0, 0] += np.float32(2**-20)
    others[2].config["use_rslora"] = True
    for other in others:
        other.write()
    assert len({first, *(load(other.folder, base).model.version for other in others)}) == 4


def test_a_later_change_of_the_file_does_not_reach_the_model(tmp_path: Path, base: BaseModules) -> None:
    loaded = load(healthy(tmp_path, base), base)
    before = {name: weights.lora_a.clone() for name, weights in loaded.model.modules.items()}
    with (tmp_path / WEIGHTS).open("r+b") as file:
        size = os.fstat(file.fileno()).st_size
        file.write(b"\xff" * size)
    assert all(torch.equal(loaded.model.modules[name].lora_a, a) for name, a in before.items())


def test_the_report(tmp_path: Path, base: BaseModules) -> None:
    d = draft(tmp_path, base, num_modules=14)
    d.config["target_modules"] = ["q_proj", "w_proj"]
    d.tensors[d.first_b][:] = 0
    d.write()
    loaded = load(tmp_path, base, torch.bfloat16)
    report = loaded.report.to_dict()
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert (report["num_modules"], report["lora_rank"], report["base_model"]) == (14, 4, "some/base")
    assert report["modules"] == dict.fromkeys(
        ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"], 2
    )
    num_params = sum(array.size for array in d.tensors.values())
    assert (report["num_params"], report["num_bytes"]) == (num_params, 2 * num_params)
    assert report["stored_dtypes"] == ["F32"]
    warnings = " | ".join(loaded.report.warnings)
    assert "w_proj" in warnings and "q_proj, w_proj" not in warnings
    assert "in 1 modules: model.layers.0.mlp.down_proj" in warnings


def test_an_adapter_of_zeros_is_loaded_and_said_to_do_nothing(tmp_path: Path, base: BaseModules) -> None:
    d = draft(tmp_path, base)
    for name, array in d.tensors.items():
        if ".lora_B." in name:
            array[:] = 0
    d.write()
    assert any("has no effect" in warning for warning in load(tmp_path, base).report.warnings)


@pytest.mark.parametrize("case", HOSTILE, ids=lambda case: case.name)
def test_hostile_folders_are_refused(case: HostileCase, tmp_path: Path, base: BaseModules) -> None:
    case.build(draft(tmp_path / "adapter", base))
    num_open = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with pytest.raises(AdapterRefused) as caught:
        load(tmp_path / "adapter", base)
    refused = caught.value
    assert refused.reason is case.code, str(refused)
    assert case.names in f"{refused.tensor} {refused.feature} {refused}", str(refused)
    assert refused.why and refused.fix and str(refused).isprintable() and len(str(refused)) < 1200
    assert num_open == 0 or len(os.listdir("/proc/self/fd")) == num_open


def test_every_code_the_loader_gives_is_in_the_table() -> None:
    given = {case.code for case in HOSTILE}
    assert set(RefusalCode) - given == {RefusalCode.CONFLICT}  # of composition, not of loading


def test_a_regex_bomb_is_refused_within_a_millisecond() -> None:
    def once() -> float:
        start = time.perf_counter()
        with pytest.raises(AdapterRefused):
            NamePattern.parse("([a-z_.0-9]+)+!", field="rank_pattern")
        return time.perf_counter() - start

    assert min(once() for _ in range(20)) < 1e-3


def test_limits_are_checked_before_data_is_read(tmp_path: Path, base: BaseModules) -> None:
    folder = healthy(tmp_path, base, r=4)
    size = (folder / WEIGHTS).stat().st_size
    assert load(folder, base, max_adapter_bytes=size, max_lora_rank=4).model.lora_rank == 4
    for limits, words in (
        ({"max_adapter_bytes": size - 1}, f"--max-adapter-bytes {size}"),
        ({"max_lora_rank": 3}, "--max-lora-rank 4"),
    ):
        with pytest.raises(AdapterRefused) as caught:
            load(folder, base, **limits)
        assert caught.value.reason is RefusalCode.TOO_LARGE and words in str(caught.value)


def test_a_sparse_file_of_a_terabyte_is_refused_at_once(tmp_path: Path, base: BaseModules) -> None:
    with (healthy(tmp_path, base) / WEIGHTS).open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(AdapterRefused) as caught:
        load(tmp_path, base)
    assert caught.value.reason is RefusalCode.TOO_LARGE


@pytest.mark.parametrize("place", ["absent", "empty", "file", "nul\0byte"])
def test_where_there_is_no_adapter(place: str, tmp_path: Path, base: BaseModules) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterNotFound):
        load(tmp_path / place, base)


def test_a_subfolder_that_holds_the_adapter_is_named(tmp_path: Path, base: BaseModules) -> None:
    healthy(tmp_path / "checkpoint-20", base)
    (tmp_path / "training_args.bin").write_bytes(b"")
    with pytest.raises(AdapterNotFound, match="in the subfolder checkpoint-20"):
        load(tmp_path, base)


def test_a_folder_with_a_config_alone_names_the_file_it_lacks(tmp_path: Path, base: BaseModules) -> None:
    (healthy(tmp_path, base) / WEIGHTS).unlink()
    with pytest.raises(AdapterNotFound, match=WEIGHTS):
        load(tmp_path, base)


def test_links_of_the_hub_cache_are_followed_within_their_repo(tmp_path: Path, base: BaseModules) -> None:
    repo = tmp_path / "models--org--adapter"
    snapshot = healthy(repo / "snapshots" / "abc", base)
    (repo / "blobs").mkdir()
    for number, name in enumerate((CONFIG_NAME, WEIGHTS)):
        (snapshot / name).rename(repo / "blobs" / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    assert load(snapshot, base).model.lora_rank == 4
    (tmp_path / "other").mkdir()
    (repo / "blobs" / "1").rename(tmp_path / "other" / "1")
    (snapshot / WEIGHTS).unlink()
    (snapshot / WEIGHTS).symlink_to(tmp_path / "other" / "1")
    with pytest.raises(AdapterRefused, match="leads out"):
        load(snapshot, base)


def test_a_link_put_there_after_the_check_is_not_followed(tmp_path: Path, base: BaseModules) -> None:
    folder = healthy(tmp_path / "adapter", base)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / WEIGHTS).write_bytes(b"secret")
    (folder / "swapped").symlink_to(tmp_path / "outside")
    (folder / "swapped.safetensors").symlink_to(tmp_path / "outside" / WEIGHTS)
    with AdapterFolder.find(folder) as place:
        for name in (f"swapped/{WEIGHTS}", "swapped.safetensors"):
            with pytest.raises(AdapterRefused, match="leads out"), place.open(name):
                pass


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path, base: BaseModules) -> None:
    with AdapterFolder.find(healthy(tmp_path, base)) as place, place.open(WEIGHTS) as file:
        os.truncate(tmp_path / WEIGHTS, 100)
        with pytest.raises(AdapterRefused, match="became shorter"):
            file.read(file.num_bytes)


def test_a_full_model_beside_the_adapter_is_not_mistaken_for_it(tmp_path: Path, base: BaseModules) -> None:
    healthy(tmp_path, base)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    write_safetensors(tmp_path / "model-00001-of-00001.safetensors", {"w": np.ones((1, 1), np.float32)})
    assert load(tmp_path, base).model.lora_rank == 4
