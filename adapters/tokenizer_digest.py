"""A digest of what a tokenizer.json does to a text, the same however the file is spelled.

Python's JSON reader holds the interpreter's lock until a file is read, for half a second where it has 20 MB, so large
ones are read in a process of their own. Knows no tokenizer.
"""

import json

from adapters.errors import AdapterRefused
from adapters.json_digest import digest_of_fields
from adapters.run_apart import LARGE, CameToNoEnd, run_apart
from adapters.untrusted_json import corrupt, parse_object

TOKENIZER_NAME = "tokenizer.json"
_OF_BATCHES = ("truncation", "padding")  # parts that do not change what a text's tokens are


def tokenizer_digest(data: bytes) -> str:
    """Raises AdapterRefused (adapter_corrupt) for what is not a strict JSON object."""
    try:
        said = run_apart(__name__, data) if len(data) > LARGE else None
    except CameToNoEnd:  # Python's own reader ends no process: whoever ended it, the file is not to blame
        said = None
    if said is None:
        return _digest(data)
    found = parse_object(said, what="the digest of a tokenizer")
    if "why" in found:
        raise corrupt(TOKENIZER_NAME, str(found["why"]))
    return str(found["digest"])


def answer(data: bytes) -> bytes:
    """The digest of `data` or why it has none, as JSON."""
    try:
        return json.dumps({"digest": _digest(data)}).encode()
    except AdapterRefused as refusal:
        return json.dumps({"why": refusal.why.removeprefix(f"{TOKENIZER_NAME} ")}).encode()


def _digest(data: bytes) -> str:
    fields = parse_object(data, what=TOKENIZER_NAME)
    return digest_of_fields({name: value for name, value in fields.items() if name not in _OF_BATCHES})
