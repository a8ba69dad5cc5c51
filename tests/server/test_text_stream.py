"""Whatever the chunking, the deltas are the one-shot decode cut at the first stop string, and nothing is taken back."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.text_stream import TextStream
from server.tokenizer import Tokenizer
from tests.server.fakes import byte_fallback_tokenizer, byte_level_tokenizer, slow_tokenizer

TEXTS = (
    "the quick stop",
    " leading space",
    "👩‍👩‍👧‍👦 and 🏳️‍🌈",
    "日本語のテキスト",
    "Съешь же ещё этих булок",
    "naïve café\n\n  two  spaces ",
    "literal \ufffd stays",
)
ALL = pytest.mark.parametrize("make", [byte_level_tokenizer, byte_fallback_tokenizer, slow_tokenizer])


def cut(text: str, stops: Sequence[str], include_stop: bool) -> tuple[str, str | None]:
    """The slow twin: the first end of a stop string in `text`, the longest of those that end there."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return (text[:end] if include_stop else text[: end - len(stop)]), stop
    return text, None


def run(stream: TextStream, ids: Sequence[int], cuts: Sequence[int]) -> tuple[list[str], str | None, int]:
    """Push ids in chunks that end at `cuts`; returns the deltas, the stop string and the number of tokens used."""
    bounds = [0, *sorted(min(at, len(ids)) for at in cuts), len(ids)]
    texts, used = [], 0
    for begin, end in zip(bounds, bounds[1:], strict=False):
        delta = stream.push(ids[begin:end], finished=False)
        texts.append(delta.text)
        used += delta.num_tokens
        if delta.stopped is not None:
            return texts, delta.stopped, used
    delta = stream.push([], finished=True)
    return [*texts, delta.text], delta.stopped, used


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_random_bytes_equal_one_shot_decode_for_byte_level(data: st.DataObject) -> None:
    """Any ids at all: broken characters, special tokens, ids of no token."""
    tokenizer = byte_level_tokenizer()
    ids = data.draw(st.lists(st.integers(0, tokenizer.max_id + 3), max_size=40))
    check_against_one_shot(tokenizer, [], ids, data)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_text_equals_one_shot_decode(data: st.DataObject) -> None:
    """Any text, through all three ways of decoding, behind a prompt."""
    tokenizer = data.draw(st.sampled_from([byte_level_tokenizer(), byte_fallback_tokenizer(), slow_tokenizer()]))
    text = data.draw(st.lists(st.sampled_from(TEXTS) | st.text(max_size=8), max_size=4).map("".join))
    check_against_one_shot(tokenizer, tokenizer.encode("A prompt."), plain_ids(tokenizer, text), data)


def plain_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def check_against_one_shot(tokenizer: Tokenizer, prompt: list[int], ids: list[int], data: st.DataObject) -> None:
    prompt = [token_id for token_id in prompt if token_id not in tokenizer.special_ids]
    whole = tokenizer.decode([*prompt, *ids])[len(tokenizer.decode(prompt)) :]
    stops = data.draw(stop_strings(whole))
    include_stop = data.draw(st.booleans())
    skip = data.draw(st.booleans()) if tokenizer.is_byte_level else True
    if not skip:
        whole = tokenizer.decode(ids, skip_special_tokens=False)
    cuts = data.draw(st.lists(st.integers(0, max(len(ids), 1)), max_size=10))
    stream = TextStream(tokenizer, prompt, stops, include_stop=include_stop, skip_special_tokens=skip)
    texts, stopped, used = run(stream, ids, cuts)
    assert ("".join(texts), stopped) == cut(whole, stops, include_stop)
    by_token = TextStream(tokenizer, prompt, stops, include_stop=include_stop, skip_special_tokens=skip)
    one_by_one = run(by_token, ids, range(len(ids)))
    assert ("".join(one_by_one[0]), stopped, used) == ("".join(texts), one_by_one[1], one_by_one[2])


def stop_strings(text: str) -> st.SearchStrategy[tuple[str, ...]]:
    """Pieces of the text itself, so that most of them occur, and strings that begin alike."""
    anything = st.text("abte \ufffd", min_size=1, max_size=4)
    if not text:
        return st.lists(anything, max_size=3).map(tuple)
    pieces = st.tuples(st.integers(0, len(text) - 1), st.integers(1, 6)).map(lambda p: text[p[0] : p[0] + p[1]])
    return st.lists(pieces | anything, max_size=4).map(tuple)


@ALL
@pytest.mark.parametrize("text", TEXTS)
def test_known_texts_come_back_token_by_token(make, text: str) -> None:
    tokenizer = make()
    prompt = tokenizer.encode("It is:", add_special_tokens=False)
    ids = tokenizer.encode("It is:" + text, add_special_tokens=False)
    assert ids[: len(prompt)] == prompt
    stream = TextStream(tokenizer, prompt)
    texts, _, _ = run(stream, ids[len(prompt) :], range(len(ids)))
    assert "".join(texts) == text
    assert len(texts) > 2


@ALL
def test_what_is_held_back_comes_at_the_end(make) -> None:
    """The first two bytes of a three-byte character, and no more."""
    tokenizer = make()
    euro = first_bytes_of_euro(tokenizer)
    stream = TextStream(tokenizer, [])
    assert stream.push(euro).text == ""
    rest = stream.push([], finished=True).text
    assert rest == tokenizer.decode(euro)
    assert set(rest) == {"\ufffd"} or tokenizer.fast is None  # ByT5's own decode leaves broken bytes out


def first_bytes_of_euro(tokenizer: Tokenizer) -> list[int]:
    by_bytes = {tokenizer.token_bytes(token_id): token_id for token_id in range(tokenizer.max_id + 1)}
    return [by_bytes[b"\xe2"], by_bytes[b"\x82"]] if tokenizer.fast else tokenizer.encode("€")[:2]


@pytest.mark.parametrize("make", [byte_level_tokenizer, byte_fallback_tokenizer])
def test_a_run_of_broken_bytes_is_let_go_in_bounded_time(make) -> None:
    tokenizer = make()
    lead = first_bytes_of_euro(tokenizer)[0]
    stream = TextStream(tokenizer, [])
    before_end = "".join(stream.push([lead]).text for _ in range(200))
    assert len(before_end) >= 150
    assert set(before_end + stream.push([], finished=True).text) == {"\ufffd"}


def test_a_broken_run_behind_good_bytes_keeps_the_stream_going() -> None:
    """One bad byte makes sentencepiece's decoder break the good character before it, which is already sent."""
    tokenizer = byte_fallback_tokenizer()
    ids = tokenizer.encode("€", add_special_tokens=False)
    bad = first_bytes_of_euro(tokenizer)[0]
    word = tokenizer.encode("the end", add_special_tokens=False)
    stream = TextStream(tokenizer, [])
    texts, _, _ = run(stream, [*ids, bad, *word], range(40))
    assert "".join(texts).strip().startswith("€")
    assert "".join(texts).endswith("the end")


@ALL
def test_leading_space_survives_behind_a_prompt_only(make) -> None:
    tokenizer = make()
    ids = tokenizer.encode("the the", add_special_tokens=False)
    prompt = ids if tokenizer.is_byte_level else tokenizer.encode("the")
    space_the = tokenizer.encode("x the", add_special_tokens=False)[
        len(tokenizer.encode("x", add_special_tokens=False)) :
    ]
    assert TextStream(tokenizer, prompt).push(space_the, finished=True).text == " the"


def test_prompt_is_never_given_out_when_it_ends_inside_a_character() -> None:
    tokenizer = byte_fallback_tokenizer()
    prompt = [*tokenizer.encode("the fox"), *first_bytes_of_euro(tokenizer)]
    ids = tokenizer.encode("dog", add_special_tokens=False)
    assert TextStream(tokenizer, prompt).push(ids, finished=True).text.strip() == "dog"


def test_special_tokens_are_skipped_or_shown() -> None:
    tokenizer = byte_level_tokenizer()
    ids = tokenizer.encode("a<|end|>b<tool>")
    assert TextStream(tokenizer, []).push(ids, finished=True).text == "ab<tool>"
    shown = TextStream(tokenizer, [], skip_special_tokens=False).push(ids, finished=True).text
    assert shown == "a<|end|>b<tool>"


def test_hold_back_and_release() -> None:
    tokenizer = byte_level_tokenizer()
    stream = TextStream(tokenizer, [], stop=("ENDING",))
    texts = [stream.push(tokenizer.encode(part)).text for part in ("x EN", "D", "ED ", "ENDI", "NG more")]
    assert texts == ["x ", "", "ENDED ", "", ""]
    assert stream.push(tokenizer.encode("never")).text == ""
    assert stream.push([], finished=True) == stream.push([])


def test_a_long_stop_string_that_nearly_matches_stays_linear() -> None:
    tokenizer = byte_level_tokenizer()
    stop = "a" * 20_000 + "b"
    stream = TextStream(tokenizer, [], stop=(stop,))
    a = tokenizer.encode("a")
    first = stream.push(a * 30_000).text
    assert first == "a" * 10_000
    assert first + stream.push([], finished=True).text == "a" * 30_000


def test_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        TextStream(byte_level_tokenizer(), [], stop=("",))


def test_real_tokenizer_streams_what_it_decodes(default_model_folder: Path) -> None:
    tokenizer = Tokenizer.load(default_model_folder)
    for text in TEXTS:
        ids = plain_ids(tokenizer, text * 3)
        texts, stopped, _ = run(TextStream(tokenizer, [], stop=("ZZ",)), ids, range(len(ids)))
        assert ("".join(texts), stopped) == (text * 3, None)


@ALL
@pytest.mark.parametrize("num_chunks", [1, 3, 40])
def test_stop_strings_are_looked_for_behind_min_tokens(make, num_chunks: int) -> None:
    tokenizer = make()
    ids = plain_ids(tokenizer, "stop the stop dog stop")
    behind = plain_ids(tokenizer, "stop the")
    for min_tokens, kept in ((0, ""), (1, None), (len(behind), "stop the"), (len(ids), "stop the stop dog stop")):
        stream = TextStream(tokenizer, [], stop=("stop",), min_tokens=min_tokens)
        size = -(-len(ids) // num_chunks)
        texts, _, used = run(stream, ids, range(0, len(ids), size))
        assert used >= min_tokens
        if kept is not None:
            assert "".join(texts).strip() == kept
