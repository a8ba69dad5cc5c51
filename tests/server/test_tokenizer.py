"""Ids and text both ways, a token's true bytes, the chat template's sandbox and its refusals."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from server.errors import BadRequest
from server.tokenizer import Tokenizer, TokenizerNotLoaded
from tests.server.fakes import byte_fallback_tokenizer, byte_level_tokenizer, slow_tokenizer

ALL = pytest.mark.parametrize("make", [byte_level_tokenizer, byte_fallback_tokenizer, slow_tokenizer])
USER = [{"role": "user", "content": "hello"}]


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_bytes_of_the_tokens_are_the_bytes_of_the_text(text: str) -> None:
    tokenizer = byte_level_tokenizer()
    ids = tokenizer.encode(text)
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@ALL
def test_text_comes_back(make) -> None:
    tokenizer = make()
    text = "Привет 日本 👩‍👩‍👧 the fox"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_part_of_a_character_has_its_bytes_and_no_text_of_its_own() -> None:
    for tokenizer in (byte_level_tokenizer(), byte_fallback_tokenizer()):
        by_bytes = {tokenizer.token_bytes(token_id): token_id for token_id in range(tokenizer.max_id + 1)}
        assert tokenizer.whole_text(by_bytes[b"\xe2"]) is None
        assert tokenizer.whole_text(by_bytes[b" the"]) == " the"


@ALL
def test_unknown_ids_are_nothing(make) -> None:
    tokenizer = make()
    beyond = tokenizer.max_id + 1000
    if tokenizer.fast is not None:
        assert (tokenizer.token_bytes(beyond), tokenizer.whole_text(beyond)) == (b"", "")
        assert tokenizer.decode([beyond]) == ""


def test_ids_that_leave_some_out_are_counted() -> None:
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 7, "c": 3}, unk_token="a"))
    fast.add_tokens(["d"])
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=fast))
    assert (tokenizer.vocab_size, tokenizer.max_id) == (4, 7)


def test_sizes_and_special_ids() -> None:
    tokenizer = byte_level_tokenizer()
    assert tokenizer.max_id == tokenizer.vocab_size - 1
    assert tokenizer.special_ids == {0, 1}
    assert tokenizer.eos_token_ids == {1}
    assert tokenizer.token_bytes(1) == b"<|end|>"
    assert byte_fallback_tokenizer().special_ids == {0, 1, 2}


def test_special_tokens_are_added_where_the_model_wants_them() -> None:
    assert slow_tokenizer().encode("a")[-1] in slow_tokenizer().special_ids
    assert slow_tokenizer().encode("a", add_special_tokens=False) == slow_tokenizer().encode("a")[:-1]


@ALL
def test_many_threads_at_once(make) -> None:
    tokenizer = make()
    texts = [f"text {number} Привет the quick" * 20 for number in range(200)]
    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(lambda text: tokenizer.encode(text, add_special_tokens=False), texts))
        assert list(pool.map(tokenizer.decode, ids)) == texts


def test_saved_folder_loads_the_same(tmp_path: Path) -> None:
    original = byte_level_tokenizer()
    original._hf.save_pretrained(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode("the fox <|end|>") == original.encode("the fox <|end|>")
    assert loaded.is_byte_level and loaded.has_chat_template


@pytest.mark.parametrize(
    "files", [{}, {"tokenizer.json": "{}"}, {"tokenizer_config.json": '{"tokenizer_class": "Nope"}'}]
)
def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(TokenizerNotLoaded, match=str(tmp_path)):
        Tokenizer.load(tmp_path)


def test_a_folder_with_code_of_its_own_runs_none_of_it(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "mine.py").write_text(f"open({str(ran)!r}, 'w')\nclass Mine: pass\n")
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}}')
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoConfig": "mine.Mine"}, "model_type": "nope"}')
    with pytest.raises(TokenizerNotLoaded):
        Tokenizer.load(tmp_path)
    assert not ran.exists()


# Chat.


def rendered(messages: list[dict], **options) -> str:
    tokenizer = byte_level_tokenizer()
    return tokenizer.decode(tokenizer.apply_chat_template(messages, **options), skip_special_tokens=False)


def test_template_and_its_special_tokens() -> None:
    assert rendered(USER) == "<|start|>user\nhello<|end|>\n<|start|>assistant\n"
    ids = byte_level_tokenizer().apply_chat_template(USER, add_generation_prompt=False)
    assert ids[0] == 0 and ids.count(1) == 1


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    assert rendered([{"role": "user", "content": parts}]).startswith("<|start|>user\nhel\nlo<|end|>")


def test_continue_final_message() -> None:
    messages = [*USER, {"role": "assistant", "content": "Once upon "}]
    text = rendered(messages, add_generation_prompt=False, continue_final_message=True)
    assert text.endswith("<|start|>assistant\nOnce upon ")


def test_template_variables() -> None:
    assert "!" in rendered(USER, chat_template_kwargs={"shout": True})
    assert "!" not in rendered(USER, chat_template_kwargs={"shout": False, "unused": None})


@pytest.mark.parametrize(
    "options",
    [
        {"chat_template": "{{ 7 * 7 }}"},
        {"tokenize": True},
        {"return_dict": True},
        {"tools": "x"},
        {"messages": "x"},
        {"conversation": "x"},
        {"self": "x"},
        {"eos_token": "x"},
        {"add_generation_prompt": False},
        {"not a name": 1},
        {"deep": [1]},
        {"deep": {"a": 1}},
    ],
)
def test_options_that_are_no_template_variables_are_refused(options: dict) -> None:
    with pytest.raises(BadRequest) as refused:
        rendered(USER, chat_template_kwargs=options)
    assert refused.value.param == "chat_template_kwargs"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages.0.content"),
        ([*USER, {"role": "user", "content": [{"type": "text"}]}], "messages.1.content"),
        ([{"role": "user", "content": 5}], "messages.0.content"),
    ],
)
def test_messages_that_cannot_be_rendered(messages: list[dict], param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        rendered(messages)
    assert refused.value.param == param


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0]['nothing']['there'] }}",
        "{{ 1 / 0 }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for %}",
    ],
)
def test_a_failing_template_is_the_requests_fault_and_short(template: str, tmp_path: Path) -> None:
    byte_level_tokenizer()._hf.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    tokenizer = Tokenizer.load(tmp_path)
    with pytest.raises(BadRequest) as refused:
        tokenizer.apply_chat_template([{"role": "user", "content": "secret " * 1000}])
    assert refused.value.param == "messages"
    assert len(refused.value.message) < 300


def test_no_template_shows_the_way_out() -> None:
    assert not byte_fallback_tokenizer().has_chat_template
    with pytest.raises(BadRequest, match="/v1/completions"):
        byte_fallback_tokenizer().apply_chat_template(USER)


def test_real_tokenizer(default_model_folder: Path) -> None:
    tokenizer = Tokenizer.load(default_model_folder)
    text = "Семья 👩‍👩‍👧 — 日本"
    ids = tokenizer.encode(text)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text
    chat = tokenizer.decode(tokenizer.apply_chat_template(USER), skip_special_tokens=False)
    assert chat.endswith("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")
