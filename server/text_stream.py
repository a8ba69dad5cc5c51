"""Output tokens to text as they come, and stop strings found in it. Text handed out is never taken back.

Knows nothing of requests, scheduling or HTTP. Three ways from ids to text, one meaning: the concatenation of what
comes out is the one-shot decode of all ids behind the prompt's tail.

- byte-level tokenizers: the tokens' bytes through an incremental UTF-8 decoder; exact for any ids, constant work;
- other fast tokenizers: `tokenizers.decoders.DecodeStream`;
- slow tokenizers: decode a short window twice and take the difference.

A stop string is found where its last character arrives; of several that end there the longest counts. Text that may
still become a stop string is held back.
"""

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tokenizers.decoders import DecodeStream

from server.tokenizer import Tokenizer

_SEED_TOKENS = 8  # of the prompt: enough for a decoder to know that a word is not the text's first
_MAX_HELD_TOKENS = 32  # a character has at most 4 bytes; longer runs of broken ones are let go
_BROKEN = "\ufffd"


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What one push brought: text to send, the stop string that ended it, and how many of the tokens were used."""

    text: str
    stopped: str | None
    num_tokens: int


class _Decoder(Protocol):
    def push(self, token_id: int) -> str: ...
    def flush(self) -> str: ...


class _ByteDecoder:
    """Byte-level: text is the UTF-8 decoding of the tokens' bytes, so a decoder with four bytes of memory will do.

    Nearly every token is whole characters, and is looked up; the decoder sees those that are not, and what ends them.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._whole_text = tokenizer.whole_text
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._is_midway = False  # the decoder holds the begin of a character

    def push(self, token_id: int) -> str:
        if not self._is_midway and (text := self._whole_text(token_id)) is not None:
            return text
        text = self._utf8.decode(self._token_bytes(token_id))
        self._is_midway = bool(self._utf8.getstate()[0])
        return text

    def flush(self) -> str:
        self._is_midway = False
        return self._utf8.decode(b"", final=True)


class _OffsetDecoder:
    """Decode ids[window:] with and without the new ones; the difference is new once it ends in a whole character."""

    def __init__(self, tokenizer: Tokenizer, seed: Sequence[int], *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids = list(seed)
        self._num_read = len(self._ids)  # ids[:num_read] have been given out

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._new_text()
        is_held = not text or text.endswith(_BROKEN)
        if is_held and len(self._ids) - self._num_read < _MAX_HELD_TOKENS:
            return ""
        return self._take(text)

    def flush(self) -> str:
        return self._take(self._new_text())

    def _new_text(self) -> str:
        read = self._tokenizer.decode(self._ids[: self._num_read], skip_special_tokens=self._skip)
        return self._tokenizer.decode(self._ids, skip_special_tokens=self._skip)[len(read) :]

    def _take(self, text: str) -> str:
        self._ids = self._ids[self._num_read :] or self._ids
        self._num_read = len(self._ids)
        return text


class _StreamDecoder:
    """`DecodeStream`, with the flush it lacks, and the offset method once its text turns out not to be a prefix of
    what follows (sentencepiece's byte tokens: one bad byte breaks the whole run before it).
    """

    def __init__(self, tokenizer: Tokenizer, seed: Sequence[int], *, skip_special_tokens: bool) -> None:
        assert tokenizer.fast is not None
        self._fast = tokenizer.fast
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._stream = DecodeStream(ids=list(seed), skip_special_tokens=skip_special_tokens)
        self._read = list(seed)  # the ids of the last text given out: what the next ids are decoded behind
        self._held: list[int] = []
        self._rest: _OffsetDecoder | None = None

    def push(self, token_id: int) -> str:
        if self._rest is not None:
            return self._rest.push(token_id)
        self._held.append(token_id)
        try:
            text = self._stream.step(self._fast, token_id)
        except Exception:  # the one thing it raises has no class of its own
            return self._give_up()
        if text is None:
            return self._give_up() if len(self._held) >= _MAX_HELD_TOKENS else ""
        self._read, self._held = self._held, []
        return text

    def flush(self) -> str:
        return self._give_up() if self._rest is None else self._rest.flush()

    def _give_up(self) -> str:
        """Give out what is held and go on by offsets."""
        self._rest = _OffsetDecoder(self._tokenizer, self._read, skip_special_tokens=self._skip)
        text = "".join(self._rest.push(token_id) for token_id in self._held)
        return text + self._rest.flush()


class _StopMatcher:
    """One stop string, matched a character at a time (Knuth, Morris, Pratt): `num_matched` is the length of the
    longest end of the text so far that begins the string.
    """

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.num_matched = 0
        self._fallback = _fallbacks(stop)

    def push(self, char: str) -> bool:
        """Take the next character; True when it completes the string, after which no more may be pushed."""
        while self.num_matched and self.stop[self.num_matched] != char:
            self.num_matched = self._fallback[self.num_matched]
        if self.stop[self.num_matched] == char:
            self.num_matched += 1
        return self.num_matched == len(self.stop)


def _fallbacks(stop: str) -> list[int]:
    """fallbacks[n]: length of the longest proper prefix of stop[:n] that is also its end."""
    fallbacks = [0, 0]
    for char in stop[1:]:
        length = fallbacks[-1]
        while length and stop[length] != char:
            length = fallbacks[length]
        fallbacks.append(length + (stop[length] == char))
    return fallbacks


class TextStream:
    """The text of one output. Push tokens until `finished` or until a delta says `stopped`.

    A token that ended the request by its id (`RequestOutput.stop_token_id`) is not text: leave it out of the push.
    Special tokens are skipped. `stop` holds no empty string; stop strings are looked for in the text that comes after
    the first `min_tokens` tokens, and only there.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        stop: Iterable[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._decoder = _decoder(tokenizer, prompt_token_ids, self._skipped)
        self._matchers = [_StopMatcher(each) for each in dict.fromkeys(stop)]
        if any(not matcher.stop for matcher in self._matchers):
            raise ValueError("a stop string must not be empty")
        self._include_stop = include_stop
        self._num_unmatched = min_tokens  # tokens to come whose text is no part of any stop string
        self._held = ""  # decoded, not given out
        self._stopped: str | None = None

    def push(self, token_ids: Sequence[int], finished: bool = False) -> TextDelta:
        """Take the next tokens. `finished`: no more will come, give out everything that is held back.

        `num_tokens` of the delta is how many of `token_ids` were used: all, or up to the one that completed the stop
        string. After a stop string further tokens bring nothing.
        """
        if not self._matchers:  # nothing to look for, so nothing is held back
            whole = "".join(map(self._decode, token_ids))
            return TextDelta(whole + self._decoder.flush() if finished else whole, None, len(token_ids))
        parts: list[str] = []
        num_tokens = 0
        for token_id in token_ids:
            if self._is_stopped:
                break
            num_tokens += 1
            text = self._decode(token_id)
            if self._num_unmatched:
                self._num_unmatched -= 1
                parts.append(text)
            else:
                parts.append(self._take(text))
        if finished and not self._is_stopped:
            parts.append(self._take(self._decoder.flush()))
            parts.append(self._held)
            self._held = ""
        return TextDelta("".join(parts), self._stopped, num_tokens)

    def _decode(self, token_id: int) -> str:
        return "" if token_id in self._skipped else self._decoder.push(token_id)

    @property
    def _is_stopped(self) -> bool:
        return self._stopped is not None

    def _take(self, text: str) -> str:
        """Add decoded text; return what of all that is held can no longer be part of a stop string."""
        for at, char in enumerate(text, 1):
            completed = [matcher for matcher in self._matchers if matcher.push(char)]
            if completed:
                return self._stop_at(text[:at], max((matcher.stop for matcher in completed), key=len))
        self._held += text
        num_held = max(matcher.num_matched for matcher in self._matchers)
        free = len(self._held) - num_held
        released, self._held = self._held[:free], self._held[free:]
        return released

    def _stop_at(self, text: str, stop: str) -> str:
        """`text` is the new text up to and with the last character of `stop`."""
        released, self._held = self._held + text, ""
        self._stopped = stop
        return released if self._include_stop else released.removesuffix(stop)


def _decoder(tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skipped: frozenset[int]) -> _Decoder:
    if tokenizer.is_byte_level:
        return _ByteDecoder(tokenizer)
    seed = _seed(tokenizer, prompt_token_ids, skipped)
    kind = _OffsetDecoder if tokenizer.fast is None else _StreamDecoder
    return kind(tokenizer, seed, skip_special_tokens=bool(skipped))


def _seed(tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skipped: frozenset[int]) -> list[int]:
    """The prompt's last tokens with text, so that the output's first word keeps its leading space. None when the
    prompt ends inside a character: a stream seeded so would begin by giving out the prompt.
    """
    seed: list[int] = []
    for token_id in reversed(prompt_token_ids):
        if token_id not in skipped:
            seed.insert(0, token_id)
        if len(seed) == _SEED_TOKENS:
            break
    ends_whole = not tokenizer.decode(seed, skip_special_tokens=bool(skipped)).endswith(_BROKEN)
    return seed if ends_whole else []
