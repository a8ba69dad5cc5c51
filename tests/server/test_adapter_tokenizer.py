"""Tokenizers made of an adapter's bytes: what is taken from them, what is the base's, and how long they are kept."""

import asyncio
import json
import threading
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from adapters.adapter_ref import AdapterVersion
from adapters.errors import AdapterRefused, RefusalCode
from adapters.run_apart import LARGE
from server import adapter_tokenizer, tokenizer_check
from server.adapter_tokenizer import AdapterTokenizers, check_files, tokenizer_of
from server.tokenizer import Tokenizer, TokenizerNotLoaded
from tests.server.fakes import byte_fallback_tokenizer, byte_level_tokenizer, slow_tokenizer

HELLO = [{"role": "user", "content": "hello"}]
TEMPLATE = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{{ eos_token }}"


def files_with(*added: str, config: dict[str, Any] | None = None, template: str | None = None) -> dict[str, bytes]:
    """The base's tokenizer with more tokens, as the bytes of an adapter's folder."""
    base = byte_level_tokenizer().fast
    assert base is not None
    fast = FastTokenizer.from_str(base.to_str())
    fast.add_tokens([AddedToken(token, special=True) for token in added])
    files = {"tokenizer.json": fast.to_str().encode()}
    if config is not None:
        files["tokenizer_config.json"] = json.dumps(config).encode()
    if template is not None:
        files["chat_template.jinja"] = template.encode()
    return files


def made(**options: Any) -> Tokenizer:
    return tokenizer_of(files_with("<|tool|>", **options), byte_level_tokenizer())


def test_its_own_tokens_and_special_tokens() -> None:
    base = byte_level_tokenizer()
    own = made(config={"eos_token": {"content": "<|tool|>", "special": True}, "bos_token": "<|start|>", "pad_token": 3})
    assert own.max_id == base.max_id + 1
    assert own.encode("a<|tool|>") == [*base.encode("a"), own.max_id]
    assert own.token_bytes(own.max_id) == b"<|tool|>" and base.token_bytes(own.max_id) == b""
    assert own.eos_token_ids == {own.max_id} and base.eos_token_ids == {1}
    assert own.max_id in own.special_ids
    assert own.decode([*base.encode("a"), own.max_id]) == "a"


def test_its_template_or_the_bases() -> None:
    base = byte_level_tokenizer()
    by_file = made(config={"eos_token": "<|end|>", "chat_template": "no"}, template=TEMPLATE)
    by_config = made(config={"eos_token": "<|end|>", "chat_template": TEMPLATE})
    by_name = made(
        config={
            "eos_token": "<|end|>",
            "chat_template": [{"name": "rag", "template": "no"}, {"name": "default", "template": TEMPLATE}],
        }
    )
    for own in (by_file, by_config, by_name):
        assert own.decode(own.apply_chat_template(HELLO), skip_special_tokens=False) == "[hello]<|end|>"
    without = made(config={"eos_token": "<|end|>"})
    assert without.apply_chat_template(HELLO) == base.apply_chat_template(HELLO)


@pytest.mark.parametrize("make", [byte_level_tokenizer, byte_fallback_tokenizer, slow_tokenizer])
def test_a_template_alone_leaves_the_bases_tokenizer(make: Any) -> None:
    base = make()
    before = base.chat_template
    own = tokenizer_of({"chat_template.jinja": b"<{{ messages[0]['content'] }}>"}, base)
    text = own.decode(own.apply_chat_template(HELLO), skip_special_tokens=False)
    assert text.strip() == "<hello>"
    assert base.chat_template == before and own.max_id == base.max_id
    assert tokenizer_of({"added_tokens.json": b"{}"}, base) is base or own.fast is base.fast


def test_a_copy_of_the_bases_is_the_bases() -> None:
    base = byte_level_tokenizer()
    assert base.fast is not None
    files = {"tokenizer.json": base.fast.to_str().encode()}
    config = {"eos_token": "<|end|>", "chat_template": base.chat_template}
    assert tokenizer_of({**files, "tokenizer_config.json": json.dumps(config).encode()}, base) is base
    for change in ({"eos_token": "<|start|>"}, {"chat_template": TEMPLATE}):
        changed = json.dumps({**config, **change}).encode()
        assert tokenizer_of({**files, "tokenizer_config.json": changed}, base) is not base


def test_no_class_and_no_code_is_taken_from_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {
        "tokenizer_class": "os.system", "auto_map": {"AutoTokenizer": ["evil--tokenizer.Evil", None]},
        "backend_tokenizer": 3, "tokenizer_file": "/etc/passwd", "name_or_path": "/etc", "model_max_length": 10**30,
        "eos_token": "<|end|>", "extra_special_tokens": {"x": "y"}, "chat_template": 3,
    }  # fmt: skip
    own = made(config=config)
    assert own.eos_token_ids == {1} and own.encode("a") == byte_level_tokenizer().encode("a")


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer.json": b"{}"},
        {"tokenizer.json": b"not json"},
        {"tokenizer.json": b"\xff\xfe"},
        {"tokenizer_config.json": b"[1]"},
        {"tokenizer_config.json": b'{"eos_token": "a", "eos_token": "b"}'},
        {"chat_template.jinja": b"\xff"},
    ],
)
def test_what_cannot_be_read_is_told(files: dict[str, bytes]) -> None:
    with pytest.raises(TokenizerNotLoaded, match="that the adapter brings cannot be read") as caught:
        tokenizer_of(files, byte_level_tokenizer())
    assert caught.value.status == 400
    with pytest.raises(AdapterRefused) as refused:
        check_files(files)
    assert refused.value.reason is RefusalCode.CORRUPT and refused.value.feature in files


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer.json": b'{"hello": 1}'},
        {"chat_template.jinja": b"{% if %}"},
        {"tokenizer_config.json": b'{"chat_template": "{% if %}"}'},
    ],
)
def test_what_could_not_be_used_is_refused_when_it_is_loaded(files: dict[str, bytes]) -> None:
    with pytest.raises(AdapterRefused, match="adapter_corrupt") as refused:
        check_files(files_with() | files)
    assert refused.value.feature in files


def test_a_large_one_is_tried_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library would hold Python's lock, and with it every stream."""
    files = files_with("<|tool|>", config={"eos_token": "<|tool|>"})
    for fields, why in (({}, None), ({"model": {"type": "none"}}, "no tokenizer can be made of tokenizer.json: ")):
        parsed = {**json.loads(files["tokenizer.json"]), **fields}
        large = json.dumps({**parsed, "padding": None}).encode() + b" " * LARGE
        with monkeypatch.context() as patched:
            patched.setattr(tokenizer_check, "answer", None)  # not in this process
            if why is None:
                check_files({**files, "tokenizer.json": large})
            else:
                with pytest.raises(AdapterRefused, match=why):
                    check_files({**files, "tokenizer.json": large})
    monkeypatch.setattr("adapters.run_apart.sys.executable", "/no/such/python")
    with pytest.raises(AdapterRefused, match="no tokenizer can be made"):
        check_files({**files, "tokenizer.json": large})  # where no process can be started


@pytest.mark.parametrize("length", [200_000, 2 * LARGE])
def test_one_that_overflows_the_library_s_stack_is_refused(length: int) -> None:
    """A unigram model is freed character by character of its longest piece, within each other."""
    fields = json.loads(files_with("<|tool|>")["tokenizer.json"])
    vocab = [["<unk>", 0.0], ["a" * length, 0.0]]
    deep = json.dumps({**fields, "added_tokens": [], "model": {"type": "Unigram", "unk_id": 0, "vocab": vocab}})
    with pytest.raises(AdapterRefused, match="the library does not survive reading it") as no:
        check_files({"tokenizer.json": deep.encode()})
    assert no.value.reason is RefusalCode.CORRUPT


def test_one_is_made_where_no_file_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    files = files_with("<|tool|>", config={"eos_token": "<|tool|>"})
    expected = tokenizer_of(files, byte_level_tokenizer())
    monkeypatch.setattr("tempfile.tempdir", "/no/such/folder")
    check_files(files)
    own = tokenizer_of(files, byte_level_tokenizer())
    assert own.encode("a<|tool|>") == expected.encode("a<|tool|>") and own.eos_token_ids == expected.eos_token_ids


ENDS_THE_PROCESS = {
    "type": "BPE", "vocab": {"é": 0, "b": 1, "éb": 2}, "merges": [["b", "é"]], "continuing_subword_prefix": "x",
}  # fmt: skip
"""The library cuts off as many bytes as the prefix has, within a letter, and aborts telling of it."""


@pytest.mark.parametrize(
    "fields",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AA=="}},
        {"model": ENDS_THE_PROCESS},
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},  # at any text
        {"decoder": {"type": "Strip", "content": "a", "start": 99, "stop": 99}},  # at any token
    ],
)
@pytest.mark.parametrize("num_blanks", [0, LARGE])
def test_what_the_library_panics_at_is_refused(fields: dict[str, Any], num_blanks: int) -> None:
    parsed = {**json.loads(files_with()["tokenizer.json"]), **fields}
    data = json.dumps(parsed, ensure_ascii=False).encode() + b" " * num_blanks
    with pytest.raises(AdapterRefused, match="no tokenizer can be made of tokenizer.json: "):
        check_files({"tokenizer.json": data})


def test_as_many_tokens_of_another_spelling_are_another_tokenizer() -> None:
    base = byte_level_tokenizer()
    assert base.fast is not None
    fields = json.loads(base.fast.to_str())
    last = max(fields["model"]["vocab"], key=lambda token: fields["model"]["vocab"][token])
    fields["model"]["vocab"]["never seen"] = fields["model"]["vocab"].pop(last)
    fields["model"]["merges"] = fields["model"]["merges"][:-1]
    config = {name: base.special_tokens[name] for name in ("bos_token", "eos_token") if name in base.special_tokens}
    own = tokenizer_of(
        {"tokenizer.json": json.dumps(fields).encode(), "tokenizer_config.json": json.dumps(config).encode()}, base
    )
    assert own is not base and (own.vocab_size, own.max_id) == (base.vocab_size, base.max_id)
    assert own.fast is not None and own.fast.token_to_id("never seen") is not None


def test_what_can_be_used_is_not() -> None:
    config = {
        "eos_token": "<|tool|>",
        "chat_template": "{% generation %}{{ raise_exception('no') }}{% endgeneration %}",
    }
    check_files(files_with("<|tool|>", config=config))
    check_files(files_with("<|tool|>", template=TEMPLATE))
    check_files({"tokenizer_config.json": b"{}"})


def version(at: int) -> AdapterVersion:
    return AdapterVersion(f"{at:064x}")


@pytest.mark.asyncio
async def test_made_once_and_the_oldest_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, num_made, threads = threading.Event(), 0, set()

    def counted(files: Any, base: Tokenizer) -> Tokenizer:
        nonlocal num_made
        num_made += 1
        threads.add(threading.current_thread())
        assert gate.wait(10)
        return base

    monkeypatch.setattr(adapter_tokenizer, "tokenizer_of", counted)
    kept = AdapterTokenizers(byte_level_tokenizer(), max_kept=2)
    asking = [asyncio.create_task(kept.get(version(0), {})) for _ in range(5)]
    await asyncio.sleep(0)
    asking[0].cancel()
    gate.set()
    ends = await asyncio.gather(*asking, return_exceptions=True)
    assert isinstance(ends[0], asyncio.CancelledError) and all(end is byte_level_tokenizer() for end in ends[1:])
    assert num_made == 1 and threading.main_thread() not in threads
    await kept.get(version(1), {})
    await kept.get(version(0), {})
    await kept.get(version(2), {})
    assert (version(0) in kept, version(1) in kept, len(kept), num_made) == (True, False, 2, 3)


@pytest.mark.asyncio
async def test_a_failure_is_not_kept() -> None:
    kept = AdapterTokenizers(byte_level_tokenizer())
    with pytest.raises(TokenizerNotLoaded):
        await kept.get(version(0), {"tokenizer.json": b"{}"})
    await asyncio.sleep(0)
    assert version(0) not in kept
    assert (await kept.get(version(0), files_with("<|tool|>"))).max_id == byte_level_tokenizer().max_id + 1
