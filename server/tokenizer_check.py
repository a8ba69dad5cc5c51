"""Whether the Rust library can make and use a tokenizer of a file, asked in a process of its own: the library holds the
interpreter's lock meanwhile, a second for 20 MB, and there are files that it panics at, or that end its process.

Knows no adapter.
"""

import threading
from contextlib import suppress

import tokenizers

from adapters.run_apart import CameToNoEnd, run_apart

_TEXT = "a b\n é"
_STACK_BYTES = 2 << 20
"""A quarter of what the server's threads have: what the library does by recursion, such as to free a unigram model with
a long piece, has room there once it had room here."""


def why_unreadable(data: bytes) -> str | None:
    """What is wrong with the tokenizer.json `data`; None when it can be used."""
    try:
        said = run_apart(__name__, data)
    except CameToNoEnd as error:
        return f"the library does not survive reading it ({error})"
    return (_answer(data) if said is None else said).decode(errors="replace") or None


def answer(data: bytes) -> bytes:
    """On a small stack."""
    found: list[bytes] = []
    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=lambda: found.append(_answer(data)))
    thread.start()
    thread.join()
    return found[0]


def _answer(data: bytes) -> bytes:
    try:
        made = tokenizers.Tokenizer.from_buffer(data)
        made.no_padding()
        made.no_truncation()
        with suppress(Exception):  # of this text: another may do
            made.decode(made.encode(_TEXT).ids)
    except BaseException as error:  # what the library raises has no class of its own, and of its panics no Exception
        return (str(error) or type(error).__name__).encode()
    return b""
