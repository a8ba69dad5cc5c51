"""Whether the Rust library can make a tokenizer of a large file, asked in a process of its own: the library holds the
interpreter's lock meanwhile, a second for 20 MB.

Knows no adapter.
"""

import tokenizers

from adapters.run_apart import run_apart


def why_unreadable(data: bytes) -> str | None:
    """What is wrong with the tokenizer.json `data`; None when it can be used."""
    said = run_apart(__name__, data)
    return (answer(data) if said is None else said).decode(errors="replace") or None


def answer(data: bytes) -> bytes:
    try:
        tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # what the library raises has no class of its own
        return (str(error) or type(error).__name__).encode()
    return b""
