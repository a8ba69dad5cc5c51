"""Which folder a model name leads to, and that the installed default is whole."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig

from server import default_model
from server.default_model import DEFAULT_MODEL, ModelUnavailable, cache_folder, resolve_model


def test_default_is_converted_with_template_and_end_of_turn(default_model_folder: Path) -> None:
    config = json.loads((default_model_folder / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(default_model_folder)
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == 2
    assert GenerationConfig.from_pretrained(default_model_folder).eos_token_id == 2
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("model", [None, DEFAULT_MODEL])
def test_default_is_found_by_no_name_and_by_its_own(model: str | None, default_model_folder: Path) -> None:
    resolved = resolve_model(model)
    assert resolved.folder == default_model_folder
    assert resolved.name == (model or "SmolLM2-135M-Instruct"), "a model is served by the name it was asked by"
    assert set(resolved.names) == {"SmolLM2-135M-Instruct", DEFAULT_MODEL}


def test_local_folder_is_served_under_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    with pytest.raises(ModelUnavailable, match=r"no config\.json"):
        resolve_model(str(folder))
    (folder / "config.json").write_text("{}")
    assert resolve_model(str(folder)) == default_model.ResolvedModel(folder, "my-model")


def test_missing_folder_names_the_way_out() -> None:
    with pytest.raises(ModelUnavailable, match="is not a folder; give a Hugging Face model folder or a hub id"):
        resolve_model("./no-such-folder")


def test_hub_offline_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelUnavailable, match="HF_HUB_OFFLINE, or give a local folder"):
        resolve_model("some-org/some-model")


def test_missing_wheel_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_model, "_WHEEL_PACKAGE", "no_such_package_here")
    with pytest.raises(ModelUnavailable, match="make setup"):
        resolve_model(None)


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORAMUX_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("LORAMUX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "loramux"
