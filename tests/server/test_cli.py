"""The command line: every setting has a flag and an environment name, and errors are one line and a status."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from cyclopts import App
from cyclopts.config import Env
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from server.cli import run
from server.cli_options import ServeOptions, parse_lora_module
from server.config import AdapterConfig, CacheConfig, HTTPConfig, LoRALimits, ModelConfig, SchedulerConfig, ServerConfig

_PARTS = (ModelConfig, CacheConfig, SchedulerConfig, LoRALimits, AdapterConfig, HTTPConfig)
_SAMPLES = [("pirate", Path("/samples/pirate"))]


def _options(*arguments: str) -> tuple[str | None, ServeOptions]:
    """Parse `serve`'s arguments as the command line does."""
    app = App(config=Env("LORAMUX_", command=False))
    parsed: list[tuple[str | None, ServeOptions]] = []

    @app.default
    def serve(model: str | None = None, *, options: ServeOptions | None = None) -> None:
        parsed.append((model, options or ServeOptions()))

    app(list(arguments), exit_on_error=False, print_error=False, result_action="return_value")
    return parsed[0]


# Flags and settings.


def test_no_flags_are_the_defaults_of_the_config() -> None:
    model, options = _options()
    assert options.config(model) == ServerConfig()


def test_every_setting_has_a_flag() -> None:
    settings = {each.name for part in _PARTS for each in fields(part)} - {"model"}
    flags = {each.name for each in fields(ServeOptions)}
    assert settings <= flags
    assert flags - settings == {"served_model_name", "lora_modules", "samples", "enable_lora"}


def test_flags_in_vllms_spelling_reach_the_config() -> None:
    model, options = _options(
        *("org/name", "--dtype", "float32", "--max-num-seqs", "8", "--max-num-batched-tokens", "64"),
        *("--kv-cache-memory", "512MiB", "--lora-memory", "0.5", "--max-lora-rank", "32", "--enable-lora"),
        *("--enforce-eager",),
        *("--no-enable-prefix-caching", "--served-model-name", "a", "b", "--port", "9000", "--shutdown-timeout", "5"),
        *("--lora-modules", "x=/x", '{"name": "y", "path": "/y", "base_model_name": "z"}'),
    )
    config = options.config(model, _SAMPLES)
    assert config.engine.model == ModelConfig(model="org/name", dtype="float32", enforce_eager=True)
    assert config.engine.scheduler == SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64)
    assert config.engine.cache == CacheConfig(kv_cache_memory=512 * 1024**2, enable_prefix_caching=False)
    assert config.engine.lora == LoRALimits(lora_memory=512 * 1024**2, max_lora_rank=32)
    assert (config.http.port, config.http.shutdown_timeout) == (9000, 5.0)
    assert config.served_model_names == ("a", "b")
    assert config.lora_modules == (("x", Path("/x")), ("y", Path("/y")))


def test_environment_sets_flags_and_flags_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAMUX_MAX_NUM_SEQS", "7")
    monkeypatch.setenv("LORAMUX_KV_CACHE_MEMORY", "2GiB")
    monkeypatch.setenv("LORAMUX_LORA_MODULES", "a=/a b=/b")
    monkeypatch.setenv("LORAMUX_API_KEY", "secret")
    monkeypatch.setenv("LORAMUX_PORT", "1")
    monkeypatch.setenv("LORAMUX_CACHE", "/elsewhere")
    model, options = _options("--port", "2")
    config = options.config(model)
    assert config.engine.scheduler.max_num_seqs == 7
    assert config.engine.cache.kv_cache_memory == 2 * 1024**3
    assert config.lora_modules == (("a", Path("/a")), ("b", Path("/b")))
    assert config.http.api_key == "secret"
    assert config.http.port == 2


@pytest.mark.parametrize(
    ("arguments", "served"),
    [
        ((), ["pirate"]),
        (("--no-samples",), []),
        (("org/name",), []),
        (("org/name", "--samples"), ["pirate"]),
        (("--lora-modules", "mine=/m"), ["pirate", "mine"]),
    ],
)
def test_samples_come_with_the_default_model(arguments: tuple[str, ...], served: list[str]) -> None:
    model, options = _options(*arguments)
    assert [name for name, _ in options.config(model, _SAMPLES).lora_modules] == served


def test_named_adapter_wins_over_a_sample() -> None:
    model, options = _options("--lora-modules", "pirate=/mine")
    assert options.config(model, _SAMPLES).lora_modules == (("pirate", Path("/mine")),)


@pytest.mark.parametrize("text", ["noequals", "=path", "name=", "{broken", '{"name": "a"}', '{"name":"a","pth":"b"}'])
def test_bad_lora_module_names_what_is_wrong(text: str) -> None:
    with pytest.raises(ValueError, match="--lora-modules"):
        parse_lora_module(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("serve", "--max-num-seqs", "0"), "Must be >= 1"),
        (("serve", "--kv-cache-memory", "lots"), "not an amount of memory"),
        (("serve", "--lora-modules", "a=/a", "a=/b"), "names 'a' twice"),
        (("serve", "--lora-modules", "nonsense"), "name=folder"),
        (("serve", "--dtype", "float17"), "float17"),
        (("serve", "--no-such-flag"), "--no-such-flag"),
    ],
)
def test_mistyped_flags_are_status_2(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(list(arguments)) == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_open_server_on_all_addresses_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--host", "0.0.0.0"]) == 1
    assert "set --api-key, or bind to 127.0.0.1" in capsys.readouterr().err


def test_missing_model_is_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "./no-such-model", "--port", "0"]) == 1
    assert "is not a folder" in capsys.readouterr().err


def test_folder_without_weights_is_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert run(["serve", str(tmp_path), "--port", "0"]) == 1
    assert f"cannot be served from {tmp_path}" in capsys.readouterr().err


# check


def test_check_against_no_known_model_is_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    assert run(["check", str(tmp_path), "--model", str(tmp_path)]) == 1
    assert "cannot be read" in capsys.readouterr().err


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_adapter(tiny_model: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    folder = tiny_model.parent / "adapter"
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder)
    return folder


def test_check_prints_the_verdict(tiny_model: Path, tiny_adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", str(tiny_adapter), "--model", str(tiny_model)]) == 0
    out = capsys.readouterr().out
    assert "would be served on llama" in out
    assert "4 of 14: q_proj x 2, v_proj x 2" in out


def test_check_reads_the_base_s_weights_where_an_adapter_needs_them(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    config = LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path)
    assert run(["check", str(tmp_path), "--model", str(tiny_model)]) == 0
    out = capsys.readouterr().out
    assert "features  dora" in out and "gains     2, " in out


def test_check_shows_how_many_norms_are_done_on_a_terminal(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    config = LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path)
    assert run(["check", str(tmp_path), "--model", str(tiny_model)]) == 0
    assert "64/64 norms" in capsys.readouterr().err
    assert run(["check", str(tmp_path), "--model", str(tiny_model), "--ignore", "nothing"]) == 1


def test_check_ignores_what_it_is_told_to(
    tiny_model: Path, tiny_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["check", str(tiny_adapter), "--model", str(tiny_model)]
    ignore = ["--ignore", "*.layers.0.*q_proj*", "--ignore", "*.layers.1.*v_proj*"]
    assert run([*command, *ignore]) == 0
    out = capsys.readouterr().out
    assert "2 of 14: q_proj x 1, v_proj x 1" in out
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert f"ignored   {name}, 512 B" in out and out.count("  ignored   ") == 4
    assert run([*command, *ignore, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ignored"][name] == 512
    assert run([*command, "--ignore", "*.norm.*"]) == 1
    assert "at   ignore=*.norm.*" in capsys.readouterr().out
    assert run([*command, "--ignore", "*.lora_A.weight"]) == 1
    assert "adapter_incomplete_pair" in capsys.readouterr().out
    assert run([*command, "--ignore", "x" * 300]) == 1
    assert "1 to 256" in capsys.readouterr().err
    assert run([*command, "--moe-lora-b-layout", "rank_major"]) == 1
    assert "no pair of fused experts" in capsys.readouterr().out


def test_check_as_json(tiny_model: Path, tiny_adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", str(tiny_adapter), "--model", str(tiny_model), "--json"]) == 0
    verdict = json.loads(capsys.readouterr().out)
    assert verdict["served"] is True
    assert verdict["modules"] == {"q_proj": 2, "v_proj": 2}
    assert len(verdict["version"]) == 64


def test_check_refuses_with_why_and_fix(
    tiny_model: Path, tiny_adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["check", str(tiny_adapter), "--model", str(tiny_model), "--max-lora-rank", "2"]
    assert run(arguments) == 1
    out = capsys.readouterr().out
    assert "is refused: adapter_too_large" in out
    assert "r=4, over max_lora_rank=2" in out
    assert run([*arguments, "--json"]) == 1
    verdict = json.loads(capsys.readouterr().out)
    assert (verdict["served"], verdict["code"]) == (False, "adapter_too_large")
    assert verdict["fix"]


def test_check_of_no_adapter_is_status_1(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", str(tmp_path), "--model", str(tiny_model)]) == 1
    assert "is refused" in capsys.readouterr().out
