"""Whether the Rust library can make a tokenizer of a file, asked in a process of its own: the library holds the
interpreter's lock meanwhile, a second for 20 MB, and what it does by recursion, such as to free a unigram model with a
piece of 200 KB, overflows the stack, which ends the process.

Knows no adapter.
"""

import threading

import tokenizers

from adapters.run_apart import DiedApart, run_apart

_STACK_BYTES = 2 << 20  # a quarter of what the server's threads have, so that what passes here has room there


def why_unreadable(data: bytes) -> str | None:
    """What is wrong with the tokenizer.json `data`; None when it can be used."""
    try:
        said = run_apart(__name__, data)
    except DiedApart as death:
        return f"it could not be read: {death}"
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
        tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # what the library raises has no class of its own
        return (str(error) or type(error).__name__).encode()
    return b""
