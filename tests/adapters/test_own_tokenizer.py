"""Which tokenizers of adapters are kept: those that mean something else than the base's, however they are spelled."""

import json
import shutil
import tracemalloc
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from adapters import tokenizer_digest
from adapters.adapter_folder import AdapterFolder
from adapters.adapter_ref import AdapterVersion
from adapters.base_walk import modules_of
from adapters.checkpoint import CheckpointLimits, LoadedAdapter, load_lora_model
from adapters.errors import AdapterRefused, RefusalCode
from adapters.own_tokenizer import MAX_BYTES, OwnTokenizers, unread_tokens
from adapters.run_apart import LARGE
from adapters.untrusted_json import parse_object
from tests.end_to_end.in_process import save_tiny_model
from tests.equivalence import oracle

LIMITS = CheckpointLimits(max_lora_rank=64, max_adapter_bytes=1 << 28)
NAMES = ("tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_model(tmp_path_factory.mktemp("base") / "model")
    config = json.loads((folder / NAMES[1]).read_text())
    (folder / NAMES[1]).write_text(json.dumps(config | {"chat_template": "{{ messages }}"}))
    (folder / "chat_template.jinja").unlink()
    return folder


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """With the base's tokenizer beside it, as trainers save it."""
    folder = oracle.make_adapter(base, tmp_path / "adapter", seed=1, r=2, target_modules=["q_proj"])
    for name in NAMES:
        shutil.copy(base / name, folder / name)
    return folder


def kept(base: Path, adapter: Path) -> set[str]:
    with AdapterFolder.find(adapter) as folder:
        return set(OwnTokenizers(base).files_of(folder))


def loaded(base: Path, adapter: Path) -> LoadedAdapter:
    modules = modules_of(oracle.fresh_base(base, torch.float32))
    return load_lora_model(adapter, modules, limits=LIMITS, dtype=torch.float32, tokenizers=OwnTokenizers(base))


def rewrite(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def version_without(base: Path, adapter: Path) -> AdapterVersion:
    modules = modules_of(oracle.fresh_base(base, torch.float32))
    return load_lora_model(adapter, modules, limits=LIMITS, dtype=torch.float32).model.version


def test_the_bases_is_not_kept_however_it_is_spelled(base: Path, adapter: Path) -> None:
    assert kept(base, adapter) == set()
    for name in NAMES:
        fields = json.loads((adapter / name).read_text())
        spelled = {key: fields[key] for key in sorted(fields, reverse=True)}
        (adapter / name).write_text(json.dumps(spelled, indent=3))
    rewrite(
        adapter / NAMES[0], truncation={"max_length": 5, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    )
    rewrite(adapter / NAMES[1], padding_side="left")
    assert kept(base, adapter) == set()
    found = loaded(base, adapter)
    assert not found.model.extras and found.model.version == version_without(base, adapter)


def test_another_template_is_kept_without_the_tokens(base: Path, adapter: Path) -> None:
    (adapter / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    assert kept(base, adapter) == {"chat_template.jinja", "tokenizer_config.json"}
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    assert kept(base, adapter) == set()
    rewrite(adapter / NAMES[1], chat_template=[{"name": "default", "template": "x"}])
    (adapter / "chat_template.jinja").unlink()
    assert kept(base, adapter) == {"tokenizer_config.json"}


def test_other_tokens_are_kept_and_make_another_version(base: Path, adapter: Path) -> None:
    fields = json.loads((adapter / NAMES[0]).read_text())
    token = {"id": 447, "content": "<new>", "special": True, "single_word": False, "lstrip": False, "rstrip": False}
    rewrite(adapter / NAMES[0], added_tokens=[*fields["added_tokens"], {**token, "normalized": False}])
    assert kept(base, adapter) == set(NAMES)
    found = loaded(base, adapter)
    assert found.model.extras.tokenizer_files["tokenizer.json"] == (adapter / NAMES[0]).read_bytes()
    assert "tokenizer" in found.model.extras.replaced and "tokenizer" in found.report.features
    assert found.model.version != version_without(base, adapter)


def test_another_end_is_kept(base: Path, adapter: Path) -> None:
    rewrite(adapter / NAMES[1], eos_token={"content": "<|other|>", "special": True})
    assert kept(base, adapter) == set(NAMES)
    (adapter / NAMES[0]).unlink()
    assert kept(base, adapter) == set()  # nothing there could produce another end


@pytest.mark.parametrize("text", ["{", '{"a": 1, "a": 2}', "[]"])
def test_a_broken_one_is_told(base: Path, adapter: Path, text: str) -> None:
    (adapter / NAMES[0]).write_text(text)
    with pytest.raises(AdapterRefused, match=r"tokenizer\.json") as caught:
        loaded(base, adapter)
    assert caught.value.reason is RefusalCode.CORRUPT


def test_a_huge_one_is_told_before_it_is_read(base: Path, adapter: Path) -> None:
    with (adapter / NAMES[0]).open("ab") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(AdapterRefused, match=f"{MAX_BYTES + 1} bytes, over the limit of {MAX_BYTES}"):
        loaded(base, adapter)


def test_a_base_without_a_tokenizer_takes_the_adapters(adapter: Path, tmp_path: Path) -> None:
    assert kept(tmp_path, adapter) == set(NAMES)


def test_the_bases_own_file_is_not_parsed(base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many others came between: it is what nearly all adapters bring, and parsing it stops all threads."""
    parsed: list[str] = []
    parse = tokenizer_digest.parse_object
    ours = OwnTokenizers(base)

    def counted(data: bytes, *, what: str) -> dict[str, object]:
        parsed.append(what)
        return parse(data, what=what)

    monkeypatch.setattr(tokenizer_digest, "parse_object", counted)
    theirs = (adapter / NAMES[0]).read_bytes()
    for count in range(40):
        (adapter / NAMES[0]).write_text(json.dumps({"version": str(count)}))
        with AdapterFolder.find(adapter) as folder:
            assert ours.files_of(folder) and ours.files_of(folder)
    assert parsed.count(NAMES[0]) == 40  # each once
    (adapter / NAMES[0]).write_bytes(theirs)
    with AdapterFolder.find(adapter) as folder:
        assert not ours.files_of(folder)
    assert parsed.count(NAMES[0]) == 40


def test_no_file_is_kept_by_what_remembers_it(base: Path, adapter: Path) -> None:
    ours = OwnTokenizers(base)
    (adapter / NAMES[0]).write_text(json.dumps({"text": "y" * 8_000_000}))
    tracemalloc.start()
    try:
        with AdapterFolder.find(adapter) as folder:
            assert ours.files_of(folder)
        assert tracemalloc.get_traced_memory()[0] < 1_000_000
    finally:
        tracemalloc.stop()


def test_what_is_kept_is_checked_once(base: Path, adapter: Path) -> None:
    checked: list[set[str]] = []

    def check(files: Mapping[str, bytes]) -> None:
        checked.append(set(files))
        if b"bad" in files["chat_template.jinja"]:
            raise AdapterRefused(RefusalCode.CORRUPT, "bad", "mend it")

    ours = OwnTokenizers(base, check=check)
    for template, num_checked in (("{{ messages }}", 0), ("good", 1), ("good", 1), ("other", 2)):
        (adapter / "chat_template.jinja").write_text(template)
        with AdapterFolder.find(adapter) as folder:
            ours.files_of(folder)
        assert len(checked) == num_checked
    (adapter / "chat_template.jinja").write_text("bad")
    for _ in range(2):
        with AdapterFolder.find(adapter) as folder, pytest.raises(AdapterRefused, match="bad"):
            ours.files_of(folder)


def test_a_template_that_is_not_utf8_is_told(base: Path, adapter: Path) -> None:
    (adapter / "chat_template.jinja").write_bytes(b"{{ \xff }}")
    with pytest.raises(AdapterRefused, match=r"chat_template\.jinja is not UTF-8 at byte 3") as caught:
        loaded(base, adapter)
    assert caught.value.reason is RefusalCode.CORRUPT


def test_tokens_in_files_that_are_not_read_are_told(tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.model", "added_tokens.json"):
        (tmp_path / name).write_bytes(b"{}")
    with AdapterFolder.find(tmp_path) as folder:
        (warning,) = unread_tokens(folder, 110)
        assert "save tokenizer.json" in warning and "110 tokens" in warning
        assert "tokenizer.model and added_tokens.json" in warning
        assert unread_tokens(folder, None) == ()
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    with AdapterFolder.find(tmp_path) as folder:
        assert unread_tokens(folder, 110) == ()


def large(base: Path, **fields: object) -> bytes:
    """The base's tokenizer with so much beside it that it is read in a process of its own."""
    return json.dumps({**json.loads((base / NAMES[0]).read_text()), **fields, "padding": {"x": "y" * LARGE}}).encode()


def test_a_large_one_means_the_same_read_apart(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest, data = tokenizer_digest.tokenizer_digest, (base / NAMES[0]).read_bytes()
    small, other = digest(data), digest(json.dumps({**json.loads(data), "a": 1}).encode())
    with monkeypatch.context() as patched:
        patched.setattr(tokenizer_digest, "parse_object", parse_short)
        assert digest(large(base)) == small
        assert digest(large(base, a=1)) == other != small
    monkeypatch.setattr("adapters.run_apart.sys.executable", "/no/such/python")
    assert digest(large(base)) == small  # where no process can be started


def parse_short(data: bytes, what: str) -> dict[str, object]:
    """What this process is to read of it."""
    assert len(data) < 1000, "read in this process"
    return parse_object(data, what=what)


@pytest.mark.parametrize("ending", [b"", b',"padding":1}', b',"a":NaN}'])
def test_a_large_one_that_is_broken_is_told_as_a_small_one_is(base: Path, ending: bytes) -> None:
    messages = []
    for padding in (b'"x"', b'"' + b"y" * LARGE + b'"'):
        with pytest.raises(AdapterRefused) as caught:
            tokenizer_digest.tokenizer_digest(b'{"padding":' + padding + ending)
        assert caught.value.reason is RefusalCode.CORRUPT and caught.value.feature == NAMES[0]
        messages.append(str(caught.value).partition("(char")[0].partition("column")[0])
    assert messages[0] == messages[1]
