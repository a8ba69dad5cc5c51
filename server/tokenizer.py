"""Text to token ids and back, and the chat template. Reads a local folder, never runs code from it.

Knows nothing of requests, sampling or streams (server/text_stream.py is the incremental way back). Every method may
be called from any thread: a fast tokenizer is used only in ways that do not change it, a slow one under a lock.
"""

import copy
import inspect
import json
import re
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import tokenizers
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from server.errors import BadRequest, ServerError

Messages = Sequence[Mapping[str, Any]]

_BYTE_FALLBACK_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_WORD_START = "\u2581"  # sentencepiece's mark for a space
_MAX_TEMPLATE_MESSAGE = 200  # characters of a template's complaint; some repeat the whole conversation
_TEXT_ONLY = "This model takes text only:"


class TokenizerNotLoaded(ServerError):
    """The folder holds no tokenizer that can be loaded without running its code."""

    code = "tokenizer_not_loaded"


class _Backend(Protocol):
    """What a fast and a slow tokenizer have in common for us."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...
    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...
    def piece(self, token_id: int) -> str | None: ...


class _FastBackend:
    """The Rust tokenizer itself: transformers' wrapper sets truncation and padding on every call and so is not
    safe to share between threads.
    """

    def __init__(self, fast: tokenizers.Tokenizer) -> None:
        fast.no_truncation()
        fast.no_padding()
        self.fast = fast

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self.fast.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return self.fast.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def piece(self, token_id: int) -> str | None:
        return self.fast.id_to_token(token_id)


class _SlowBackend:
    """A tokenizer written in Python, one caller at a time."""

    def __init__(self, slow: PreTrainedTokenizerBase) -> None:
        self._slow = slow
        self._lock = threading.Lock()

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        with self._lock:
            return list(self._slow.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        with self._lock:
            options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
            return str(self._slow.decode(list(token_ids), **options))

    def piece(self, token_id: int) -> str | None:
        with self._lock:
            piece = self._slow.convert_ids_to_tokens(token_id)
        return None if piece is None else str(piece)


class Tokenizer:
    """One model's tokenizer. Make it with `load`, or from a transformers tokenizer already made."""

    def __init__(self, hf: PreTrainedTokenizerBase) -> None:
        self._hf = hf
        fast = getattr(hf, "backend_tokenizer", None)
        self.fast: tokenizers.Tokenizer | None = fast if isinstance(fast, tokenizers.Tokenizer) else None
        self._backend: _Backend = _SlowBackend(hf) if self.fast is None else _FastBackend(self.fast)
        self.vocab_size, self.max_id = _sizes(hf, self.fast)  # tokens; the model may have more rows than its largest id
        added = hf.added_tokens_decoder
        self._token_bytes = {token_id: token.content.encode() for token_id, token in added.items()}  # grows with use
        self._whole_texts: dict[int, str | None] = {}  # grows with use
        self.special_ids: frozenset[int] = frozenset(hf.all_special_ids) | {i for i, t in added.items() if t.special}

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Load from a local folder; raises TokenizerNotLoaded."""
        try:
            hf = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError) as error:
            why = f"no tokenizer could be loaded from '{folder}': {error}; the folder needs tokenizer.json"
            raise TokenizerNotLoaded(why) from error
        return cls(hf)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The tokenizer's own end of sequence. The model's generation config may name more (`EngineInfo`)."""
        eos = self._hf.eos_token_id
        return frozenset() if eos is None else frozenset((int(eos),))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self._backend.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of the ids as they stand, spaces not cleaned up; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for, also where they are only part of a character; b"" for an unknown id.

        Of a slow tokenizer, the bytes of the token as it is written, which need not be those of its text.
        """
        known = self._token_bytes.get(token_id)
        if known is not None:
            return known
        piece = self._backend.piece(token_id)
        if piece is None:
            return b""
        return self._token_bytes.setdefault(token_id, self._piece_bytes(piece))

    def whole_text(self, token_id: int) -> str | None:
        """What `token_bytes` spells; None when that is not whole characters, and then it is text only in company."""
        try:
            return self._whole_texts[token_id]
        except KeyError:
            return self._whole_texts.setdefault(token_id, _whole(self.token_bytes(token_id)))

    def _piece_bytes(self, piece: str) -> bytes:
        if self.is_byte_level and not set(piece) - _BYTE_OF_CHAR.keys():
            return bytes(_BYTE_OF_CHAR[char] for char in piece)
        if match := _BYTE_FALLBACK_TOKEN.fullmatch(piece):
            return bytes.fromhex(match[1])
        return piece.replace(_WORD_START, " ").encode()

    @cached_property
    def is_byte_level(self) -> bool:
        """Each character of a token stands for one byte (GPT-2's alphabet)."""
        return self.fast is not None and _decoder_type(self.fast) == "ByteLevel"

    # Chat.

    @property
    def chat_template(self) -> str | None:
        template = self._hf.chat_template
        return template if isinstance(template, str) else None

    @property
    def has_chat_template(self) -> bool:
        return bool(self._hf.chat_template)

    @property
    def special_tokens(self) -> Mapping[str, Any]:  # what templates may name
        return dict(self._hf.special_tokens_map)

    def with_chat_template(self, template: str | None) -> "Tokenizer":
        """The same tokenizer, and all that was learned of it, with another template."""
        if template is None:
            return self
        other = copy.copy(self)
        other._hf = copy.copy(self._hf)
        other._hf.chat_template = template
        return other

    def apply_chat_template(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Render the model's own template in transformers' sandbox and encode the result; raises BadRequest.

        Content may be a string or a list of `{"type": "text", "text": …}` parts, which are joined by newlines.
        """
        if not self.has_chat_template:
            raise BadRequest("This model has no chat template; send the text to /v1/completions.", param="messages")
        if not messages:
            raise BadRequest("'messages' is empty; send at least one message.", param="messages")
        if continue_final_message and add_generation_prompt:
            raise BadRequest(
                "'continue_final_message' and 'add_generation_prompt' exclude each other; set one to false.",
                param="continue_final_message",
            )
        extra = dict(chat_template_kwargs or {})
        _check_template_kwargs(extra, taken=self._hf.special_tokens_map)
        text = self._render(
            [_plain_message(message, at) for at, message in enumerate(messages)],
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **extra,
        )
        return self.encode(text, add_special_tokens=False)

    def _render(self, messages: list[dict[str, Any]], **options: Any) -> str:
        try:
            text = self._hf.apply_chat_template(messages, tokenize=False, **options)
        except (TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            raise _refused(error) from error
        return str(text)


def _sizes(hf: PreTrainedTokenizerBase, fast: tokenizers.Tokenizer | None) -> tuple[int, int]:
    """Tokens, and the largest id. A dict of them, made under Python's lock, is asked for only where ids have gaps."""
    count = 0 if fast is None else fast.get_vocab_size()
    if fast is not None and count and all(fast.id_to_token(i) is not None for i in range(count)):
        return count, count - 1
    ids = hf.get_vocab().values()
    return len(ids), max(ids)


def _whole(token_bytes: bytes) -> str | None:
    try:
        return token_bytes.decode()
    except UnicodeDecodeError:
        return None


def _refused(error: Exception) -> BadRequest:
    why = str(error)[:_MAX_TEMPLATE_MESSAGE] or type(error).__name__
    return BadRequest(f"The model's chat template cannot render these messages: {why}", param="messages")


def _plain_message(message: Mapping[str, Any], at: int) -> dict[str, Any]:
    """The message with its content as one string."""
    content = message.get("content")
    if isinstance(content, str) or content is None:
        return dict(message)
    param = f"messages.{at}.content"
    if not isinstance(content, list | tuple):
        raise BadRequest(f"{_TEXT_ONLY} content must be a string or a list of text parts.", param=param)
    return {**message, "content": "\n".join(_part_text(part, param) for part in content)}


def _part_text(part: Any, param: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    text = part.get("text") if kind == "text" else None
    if not isinstance(text, str):
        raise BadRequest(f"{_TEXT_ONLY} every content part must be {{'type': 'text', 'text': …}}.", param=param)
    return text


def _render_arguments() -> frozenset[str]:
    """Names that a template option must not have: they would reach transformers, not the template."""
    functions = (PreTrainedTokenizerBase.apply_chat_template, render_jinja_template)
    names = {name for function in functions for name in inspect.signature(function).parameters}
    return frozenset(names | {"messages"})


_RESERVED = _render_arguments()
_PLAIN = (str, int, float, bool, type(None))


def _check_template_kwargs(options: Mapping[str, Any], *, taken: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if name in _RESERVED or name in taken or not name.isidentifier():
            raise BadRequest(
                f"'chat_template_kwargs' may not set '{name[:64]}'; it may only name variables of the template.",
                param="chat_template_kwargs",
            )
        if not isinstance(value, _PLAIN):
            raise BadRequest(
                f"'chat_template_kwargs.{name[:64]}' must be a string, number, boolean or null.",
                param="chat_template_kwargs",
            )


def _decoder_type(fast: tokenizers.Tokenizer) -> str | None:
    decoder = fast.decoder
    return None if decoder is None else str(json.loads(decoder.__getstate__())["type"])


def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes are themselves, the other 68 follow from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()
