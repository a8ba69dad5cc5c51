"""What the bench writes is what servers read: adapters that load, GGUF files of the right tensors, an honest table."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter

from adapters.checkpoint import CheckpointLimits, load_lora_model
from adapters.module_names import BaseModules, LinearShape
from loadtest import bench, gguf_files, server_commands, servers
from loadtest.bench import BenchSettings
from loadtest.client import LoadTestFailed
from loadtest.peft_adapters import linear_shapes, write_adapters
from loadtest.report import Figures, Percentiles
from loadtest.workload import Workload

_SHAPES = {"attn_q": (32, 32), "attn_k": (32, 16), "attn_v": (32, 16), "attn_output": (32, 32)}
_SHAPES |= {"ffn_gate": (32, 64), "ffn_up": (32, 64), "ffn_down": (64, 32)}


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    """Two decoder layers of a llama, as GGUF names them; matrices are [out, in]."""
    path = tmp_path / "tiny.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    for layer in range(2):
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", np.ones(32, np.float32))
        for name, (width_in, width_out) in _SHAPES.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.full((width_out, width_in), 0.5, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_adapters_are_accepted_by_our_loader_and_differ(gguf: Path, tmp_path: Path) -> None:
    shapes = linear_shapes(gguf)
    assert len(shapes) == 14
    folders = write_adapters(tmp_path / "peft", shapes, 2, base="tiny")
    base = BaseModules("llama", {name: LinearShape(*shape) for name, shape in shapes.items()})
    limits = CheckpointLimits(max_lora_rank=16, max_adapter_bytes=10**9)
    loaded = [load_lora_model(folder, base, limits=limits, dtype=torch.float32).model for folder in folders]
    assert [model.lora_rank for model in loaded] == [16, 16]
    assert [len(model.modules) for model in loaded] == [14, 14]
    assert loaded[0].version != loaded[1].version


def test_gguf_base_keeps_values_and_metadata(gguf: Path, tmp_path: Path) -> None:
    written = GGUFReader(gguf_files.write_base(gguf, tmp_path / "base.gguf"))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in written.tensors}
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["blk.1.ffn_down.weight"] == "BF16"
    assert written.fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]
    assert written.fields["llama.block_count"].contents() == 2


def test_gguf_adapter_has_every_pair(gguf: Path, tmp_path: Path) -> None:
    (folder,) = write_adapters(tmp_path / "peft", linear_shapes(gguf), 1, base="tiny")
    written = GGUFReader(gguf_files.write_adapter(folder, tmp_path / "a0.gguf"))
    names = {tensor.name: tuple(map(int, tensor.shape)) for tensor in written.tensors}
    assert len(names) == 28
    assert names["blk.1.attn_k.weight.lora_a"] == (32, 16)
    assert names["blk.1.attn_k.weight.lora_b"] == (16, 16)


def test_missing_binary_names_the_flag(tmp_path: Path) -> None:
    with pytest.raises(LoadTestFailed, match="--llama-server"):
        server_commands.find_llama_server(tmp_path / "none")


def test_server_that_dies_shows_its_last_words(tmp_path: Path) -> None:
    command = ["sh", "-c", "echo out of luck; exit 3"]
    with (
        pytest.raises(LoadTestFailed, match=r"ended with 3; its last words:\nout of luck"),
        servers.running(command, port=servers.free_port(), log=tmp_path / "log"),
    ):
        pass


def _figures(rate: float) -> Figures:
    times = Percentiles(1.0, 2.0, 3.0)
    return Figures(
        output_tokens_per_second=rate,
        wall_seconds=1.0,
        output_tokens=1,
        prompt_tokens=1,
        ttft_ms=times,
        itl_ms=times,
        e2e_ms=times,
        proof=None,
    )


@pytest.mark.parametrize(("peer", "status"), [([50.0, 60.0, 70.0], 0), ([90.0, 100.0, 10.0], 1)])
def test_conclusion_is_the_ratio_of_medians(peer: list[float], status: int, tmp_path: Path) -> None:
    rounds = {"loramux": [_figures(r) for r in (90.0, 96.0, 300.0)], "llama.cpp": [_figures(r) for r in peer]}
    settings = BenchSettings(results=tmp_path, publish=tmp_path / "table.md")
    assert bench.conclude(settings, Workload(models=("a0",)), rounds, load=0.1) == status
    ratio = 96.0 / sorted(peer)[1]
    assert f"medians: **{ratio:.2f}**" in (tmp_path / "table.md").read_text()
    assert len(list(tmp_path.glob("*.json"))) == 1


def test_without_a_peer_it_fails_unless_told_to_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.server_commands, "find_llama_server", lambda _: None)
    with pytest.raises(LoadTestFailed, match="nothing to compare with.*--alone"):
        bench.bench(bench.BenchSettings())
