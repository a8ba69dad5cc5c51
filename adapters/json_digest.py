"""A digest of what a large JSON object says, whatever the order of its keys and its spelling.

In slices: the encoder and a sort hold Python's interpreter until they are done, and a vocabulary of a million tokens
given whole would stop every other thread for a second. Knows nothing of what the fields mean.
"""

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping

_SLICE = 4096  # entries: some milliseconds
_NUM_LEVELS = 2  # of objects whose values are taken one by one: the file's own fields, and those of its model


def digest_of_fields(fields: Mapping[str, object]) -> str:
    digest = hashlib.sha256()
    for piece in _pieces(fields, _NUM_LEVELS):
        digest.update(b"%d " % len(piece) + piece)
    return digest.hexdigest()


def _pieces(value: object, levels: int) -> Iterator[bytes]:
    """Bytes that are the same for equal values only, if their lengths are known."""
    if isinstance(value, Mapping) and len(value) > _SLICE:
        yield b"large object of %d" % len(value)
        for part in _parted(value):
            yield _spelled(part)
    elif isinstance(value, Mapping) and levels > 0:
        yield b"object of %d" % len(value)
        for name in sorted(value):
            yield _spelled(name)
            yield from _pieces(value[name], levels - 1)
    elif isinstance(value, list):
        yield b"list of %d" % len(value)
        for begin in range(0, len(value), _SLICE):
            yield _spelled(value[begin : begin + _SLICE])
    else:
        yield _spelled(value)


def _parted(fields: Mapping[str, object]) -> list[dict[str, object]]:
    """In parts that hang on the keys alone, not on their order, so that each can be sorted by itself."""
    parts: list[dict[str, object]] = [{} for _ in range(len(fields) // _SLICE + 1)]
    for name, value in fields.items():
        parts[zlib.crc32(name.encode("utf-8", "surrogatepass")) % len(parts)][name] = value
    return parts


def _spelled(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
