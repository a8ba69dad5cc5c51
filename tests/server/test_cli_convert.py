"""`loramux convert` as it is typed: what it writes, prints and returns, and that it never leaves half a folder."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import KasaConfig
from safetensors.torch import load_file

from adapters.convert import convert_report
from server.cli import run
from tests.adapters.convert.peft_twins import assert_same_logits, save_adapter, save_base

TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def pickled(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pickled") / "adapter"
    patterns = {"rank_pattern": {"layers.0.self_attn.q_proj": 6}, "alpha_pattern": {"down_proj": 3}}
    save_adapter(base, folder, safe=False, target_modules=TARGETS, use_rslora=True, **patterns)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "adapter_config.json", "adapter_model.bin"]
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "training_args.bin").write_bytes(b"never looked at")
    return folder


def _convert(*arguments: object) -> int:
    return run(["convert", *map(str, arguments)])


def _json(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return parsed


def test_a_pickled_peft_adapter_becomes_the_same_adapter_in_safetensors(
    base: Path, pickled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "out"
    assert run(["check", str(pickled), "--model", str(base)]) == 1
    assert _convert(pickled, out, "--model", base) == 0
    said = capsys.readouterr().out
    assert "would be served as version" in said and "peft-pickle" in said
    written, source = load_file(out / "adapter_model.safetensors"), torch.load(pickled / "adapter_model.bin")
    assert written.keys() == source.keys() and all(torch.equal(written[name], source[name]) for name in source)
    assert assert_same_logits(base, pickled, out) == 0.0
    names = ["adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "convert_report.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    report = json.loads((out / "convert_report.json").read_text())
    assert report["error"]["max"] == 0.0 and report["error"]["num_modules"] == 6
    assert min(module["norm"] for module in report["error"]["by_module"].values()) > 0.1
    assert report["check"]["served"] and "own_network_namespace" in report["pickle"]


def test_the_report_tells_what_a_narrower_dtype_costs(
    base: Path, pickled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _convert(pickled, tmp_path / "out", "--model", base, "--dtype", "bfloat16", "--json") == 0
    error = _json(capsys)["error"]
    assert 1e-4 < error["worst_relative"] < 2**-7
    assert error["worst_module"] in error["by_module"] and error["max"] >= error["mean"] > 0


def test_the_file_itself_may_be_named(base: Path, pickled: Path, tmp_path: Path) -> None:
    assert _convert(pickled / "adapter_model.bin", tmp_path / "out", "--model", base) == 0


def test_what_is_refused_after_the_conversion_is_written_and_not_a_success(
    base: Path, pickled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _convert(pickled, tmp_path / "out", "--model", base, "--max-lora-rank", "4") == 1
    assert "adapter_too_large" in capsys.readouterr().out
    assert not json.loads((tmp_path / "out" / "convert_report.json").read_text())["check"]["served"]


def test_nothing_is_written_over_and_nothing_half_is_left(
    base: Path, pickled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    assert _convert(pickled, tmp_path / "there", "--model", base) == 1
    assert "is there already" in capsys.readouterr().err
    seen: list[list[str]] = []

    def fail(*_: object, **__: object) -> None:
        seen.append(sorted(os.listdir(tmp_path)))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert_report, "read_file", fail)
    assert _convert(pickled, tmp_path / "out", "--model", base) == 1
    assert "No space left" in capsys.readouterr().err
    assert len(seen[0]) == 2 and "out" not in seen[0], "built aside"
    assert os.listdir(tmp_path) == ["there"]


@pytest.mark.parametrize(
    ("name", "make", "why"),
    [
        ("absent", lambda folder: None, "there is no"),
        ("no checkpoint", lambda folder: folder.mkdir(), "holds no checkpoint"),
        ("other file", lambda folder: folder.write_text("x"), "neither safetensors nor"),
    ],
)
def test_a_source_that_is_none_is_refused_in_one_line(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, make: Any, why: str
) -> None:
    make(tmp_path / name)
    assert _convert(tmp_path / name, tmp_path / "out", "--model", base) == 1
    said = capsys.readouterr().err
    assert why in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_several_checkpoints_are_not_guessed_between(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "a.pt", "b.bin", "optimizer.pt":
        (tmp_path / name).write_bytes(b"")
    assert _convert(tmp_path, tmp_path / "out", "--model", base) == 1
    assert "a.pt, b.bin): name the file" in capsys.readouterr().err


def test_a_plain_adapter_is_sent_to_check(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_adapter(base, tmp_path / "plain", target_modules=TARGETS)
    assert _convert(tmp_path / "plain", tmp_path / "out", "--model", base) == 1
    assert "nothing to convert" in capsys.readouterr().err


def test_a_format_that_is_not_there_is_not_made_up(
    base: Path, pickled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _convert(pickled, tmp_path / "out", "--model", base, "--format", "pissa") == 1
    assert "is peft-pickle" in capsys.readouterr().err


# The other formats, as they are typed.


def _save(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    torch.save(tensors, path)
    return path


def _layer(module: str, *names: str, r: int = 3, out: int = 80, width: int = 48) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    lora_a, lora_b = torch.randn(r, width) * 0.1, torch.randn(out, r) * 0.1
    return {f"{module}.{names[0]}": lora_a, f"{module}.{names[1]}": lora_b}


UP = "model.layers.0.mlp.up_proj"


def test_a_loralib_checkpoint_needs_its_alpha(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = _save(tmp_path / "lora.pt", _layer(UP, "lora_A", "lora_B"))
    assert _convert(source, tmp_path / "out", "--model", base) == 1
    assert "give the --alpha" in capsys.readouterr().err
    assert _convert(source, tmp_path / "out", "--model", base, "--alpha", "12", "--rank", "3", "--json") == 0
    report = _json(capsys)
    assert (report["format"], report["out"]) == ("loralib", str(tmp_path / "out"))
    assert report["error"]["max"] < 1e-6 and list(report["error"]["by_module"]) == [UP]
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    lora_b = torch.load(source)[f"{UP}.lora_B"]
    assert torch.allclose(written[f"base_model.model.{UP}.lora_B.weight"], 4 * lora_b)


def test_merged_slices_are_typed_as_true_and_false(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layer = _layer(UP, "lora_A", "lora_B", r=4, out=40)  # one of two slices
    source = _save(tmp_path / "lora.pt", layer)
    arguments = (source, tmp_path / "out", "--model", base, "--alpha", "4", "--enable-lora")
    assert _convert(*arguments, "true,maybe") == 1
    assert "takes true and false" in capsys.readouterr().err
    assert _convert(*arguments, "False, true") == 0
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")[f"base_model.model.{UP}.lora_B.weight"]
    assert written[:40].abs().max() == 0 and torch.equal(written[40:], layer[f"{UP}.lora_B"])


def test_pairs_are_told_by_a_map(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = _save(tmp_path / "pairs.pt", _layer(UP, "V", "U"))
    (tmp_path / "map.json").write_text('{"u": "{module}.U", "v": "{module}.V", "scale": 2}')
    assert _convert(source, tmp_path / "out", "--model", base) == 1
    assert "need --map" in capsys.readouterr().err
    assert _convert(source, tmp_path / "out", "--model", base, "--map", tmp_path / "map.json") == 0
    assert "(pairs), 1 modules" in capsys.readouterr().out
    (tmp_path / "map.json").write_text('{"u": 1, "u": 2}')
    assert _convert(source, tmp_path / "other", "--model", base, "--map", tmp_path / "map.json") == 1
    assert "stands twice" in capsys.readouterr().err


@pytest.mark.parametrize("init", ["pissa", "olora", "kasa"])
def test_an_adapter_that_changed_its_base_is_served_after_the_conversion(
    init: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = {"kasa_config": KasaConfig()} if init == "kasa" else {"init_lora_weights": init}
    save_adapter(base, tmp_path / "in", target_modules=TARGETS, **how)
    assert run(["check", str(tmp_path / "in"), "--model", str(base)]) == 1
    assert _convert(tmp_path / "in", tmp_path / "out", "--model", base, "--format", init) == 0
    assert run(["check", str(tmp_path / "out"), "--model", str(base)]) == 0
    said = capsys.readouterr().out
    assert f"({init}), 6 modules in float32" in said and "rank 8" in said
    assert_same_logits(base, tmp_path / "in", tmp_path / "out")


def test_tensors_that_are_ignored_are_not_converted_and_are_told(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = _layer(UP, "lora_A", "lora_B")
    source = _save(tmp_path / "in.pt", tensors | {"rotary.inv_freq": torch.ones(4)})
    command = [source, tmp_path / "out", "--model", base, "--alpha", 8]
    assert _convert(*command) == 1
    assert "rotary.inv_freq" in capsys.readouterr().err
    assert _convert(*command, "--ignore", "*.inv_frequency") == 1
    assert "ignore=*.inv_frequency" in capsys.readouterr().err
    assert _convert(*command, "--ignore", "*.inv_freq") == 0
    assert "ignored   rotary.inv_freq, 16 bytes" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "convert_report.json").read_text())
    assert report["ignored"] == {"rotary.inv_freq": 16} and report["check"]["served"]
    assert len(load_file(tmp_path / "out" / "adapter_model.safetensors")) == len(tensors)


def test_what_the_loader_would_refuse_leaves_no_pickle_behind(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'it-ran'}",)

    torch.save({"a": Payload()}, tmp_path / "bad.bin")
    assert _convert(tmp_path / "bad.bin", tmp_path / "out", "--model", base) == 1
    said = capsys.readouterr().err
    assert "posix.system" in said and said.count("\n") == 1
    assert os.listdir(tmp_path) == ["bad.bin"]


def test_progress_is_shown_on_a_terminal(base: Path, tmp_path: Path) -> None:
    save_adapter(base, tmp_path / "in", target_modules=TARGETS, init_lora_weights="pissa")
    command = [sys.executable, "-m", "server", "convert", tmp_path / "in", tmp_path / "out", "--model", base]
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = "".join(iter(lambda: _read_terminal(ours), ""))
    os.close(ours)
    assert process.returncode == 0
    for stage in ("reading", "decomposing", "comparing", "checking"):
        assert stage in shown
    assert "0/6" in shown


def test_norms_of_the_check_are_shown_on_a_terminal(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    save_adapter(base, tmp_path / "in", target_modules=["q_proj"], init_lora_weights="pissa", use_dora=True)
    assert _convert(tmp_path / "in", tmp_path / "out", "--model", base) == 0
    assert "computing norms" in capsys.readouterr().err


def _read_terminal(descriptor: int) -> str:
    """What is shown next; nothing once the other side is closed, which Linux says by EIO."""
    try:
        return os.read(descriptor, 1 << 12).decode(errors="replace")
    except OSError:
        return ""
