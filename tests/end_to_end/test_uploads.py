"""Every form of folder sent by the command line to a real server: what a load of the same folder serves, exactly."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from server.cli import run
from tests.end_to_end.tiny_world import World, expected, mlx_folder, peft_folder, tiny_world

Capture = pytest.CaptureFixture[str]
Form = Callable[[World, Path, int], tuple[Path, Path]]
"""Makes a folder to send, and one of PEFT's with the same mathematics."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("uploads")
    with tiny_world(root, allowed=tmp_path_factory.getbasetemp()) as made:
        yield made


def one_file(world: World, root: Path, seed: int) -> tuple[Path, Path]:
    folder = peft_folder(world, root / "plain", seed)
    return folder, folder


def shards(index_name: str) -> Form:
    def make(world: World, root: Path, seed: int) -> tuple[Path, Path]:
        twin = peft_folder(world, root / "twin", seed, use_dora=True)
        folder = root / "sharded"
        folder.mkdir()
        (folder / "adapter_config.json").write_bytes((twin / "adapter_config.json").read_bytes())
        tensors = load_file(twin / "adapter_model.safetensors")
        files = {name: f"model-0000{at % 3 + 1}-of-00003.safetensors" for at, name in enumerate(tensors)}
        for file in set(files.values()):
            save_file({name: tensor for name, tensor in tensors.items() if files[name] == file}, folder / file)
        (folder / index_name).write_text(json.dumps({"weight_map": files}))
        return folder, twin

    return make


def mlx(world: World, root: Path, seed: int) -> tuple[Path, Path]:
    twin = peft_folder(world, root / "twin", seed)
    return mlx_folder(twin, root / "mlx"), twin


FORMS: dict[str, Form] = {
    "one-file": one_file,
    "shards": shards("adapter_model.safetensors.index.json"),
    "shards-as-a-model": shards("model.safetensors.index.json"),
    "mlx": mlx,
}


def sent(world: World, name: str, folder: Path, capsys: Capture) -> str:
    """The version that an upload by the command line is served as."""
    assert run(["adapters", "upload", name, str(folder), "--url", world.server.url]) == 0, capsys.readouterr().err
    return version_of(world, name)


def version_of(world: World, name: str) -> str:
    return str(httpx.get(f"{world.server.url}/v1/adapters/{name}", timeout=30).json()["version"])


@pytest.mark.parametrize("form", FORMS)
def test_an_upload_is_the_folder(world: World, form: str, tmp_path: Path, capsys: Capture) -> None:
    folder, twin = FORMS[form](world, tmp_path, 20 + len(form))
    (folder / "README.md").write_text("of no use to a server")
    uploaded = sent(world, f"sent/{form}", folder, capsys)
    assert uploaded == world.load(f"local/{form}", folder)["version"]
    tokens = world.answer(f"sent/{form}")
    assert tokens == world.answer(f"local/{form}") == expected(world, twin)


def test_a_tokenizer_and_a_template_come_with_it(world: World, tmp_path: Path, capsys: Capture) -> None:
    plain = peft_folder(world, tmp_path / "adapter", 31)
    bare = world.load("bare", plain)["version"]
    tokenizer = AutoTokenizer.from_pretrained(world.model)
    tokenizer.add_tokens(["select star"])
    tokenizer.chat_template = "{% for m in messages %}select star {{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(plain)
    assert (plain / "chat_template.jinja").is_file()
    uploaded = sent(world, "sent/words", plain, capsys)
    assert uploaded == world.load("local/words", plain)["version"] != bare
    asked = {"max_tokens": 4, "temperature": 0, "messages": [{"role": "user", "content": "select star"}]}
    counts = {}
    for name in ("bare", "sent/words", "local/words"):
        reply = httpx.post(f"{world.server.url}/v1/chat/completions", json={"model": name, **asked}, timeout=60)
        assert reply.status_code == 200, reply.text
        counts[name] = (reply.json()["usage"]["prompt_tokens"], reply.json()["choices"][0]["message"]["content"])
    assert counts["sent/words"] == counts["local/words"] != counts["bare"]


def test_a_shard_that_is_missing_is_told_before_anything_is_sent(world: World, tmp_path: Path, capsys: Capture) -> None:
    folder, _ = FORMS["shards"](world, tmp_path, 5)
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert run(["adapters", "upload", "lacking", str(folder), "--url", world.server.url]) == 1
    assert "model-00002-of-00003.safetensors cannot be read" in " ".join(capsys.readouterr().err.split())
    assert httpx.get(f"{world.server.url}/v1/adapters/lacking", timeout=30).status_code == 404


def test_tensors_that_a_shard_lacks_are_refused_by_the_server(world: World, tmp_path: Path, capsys: Capture) -> None:
    folder, _ = FORMS["shards"](world, tmp_path, 6)
    file = folder / "model-00002-of-00003.safetensors"
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors | {"more": torch.zeros(1)}, file)
    assert run(["adapters", "upload", "lacking", str(folder), "--url", world.server.url]) == 1
    assert "adapter_corrupt" in capsys.readouterr().err
