"""Bytes as people write and read them: 512MiB, 2GiB, 1.5. Knows nothing of what the bytes are for."""

import re

_UNITS = {
    "": 1,
    "b": 1,
    "k": 1024,
    "kb": 1000,
    "kib": 1024,
    "m": 1024**2,
    "mb": 1000**2,
    "mib": 1024**2,
    "g": 1024**3,
    "gb": 1000**3,
    "gib": 1024**3,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)
_LARGEST_GIB = 1024  # a bare number below this is GiB, from here on bytes


def parse_memory(text: str) -> int:
    """Bytes of `512MiB`, `2GiB`, `2G`, `1.5` (GiB) or `1073741824` (bytes). Raises ValueError."""
    found = _SIZE.fullmatch(text)
    if found is None or found[2].lower() not in _UNITS:
        raise ValueError(f"{text!r} is not an amount of memory; write 512MiB, 2GiB, a number of GiB, or bytes")
    number, unit = float(found[1]), found[2].lower()
    if not unit and number < _LARGEST_GIB:
        unit = "gib"
    return int(number * _UNITS[unit])


def format_memory(num_bytes: int) -> str:
    """`num_bytes` with a binary unit and at most one decimal: 1 GiB, 256.6 MiB, 17 B."""
    size, units = float(num_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        del units[0]
    return f"{size:.1f}".removesuffix(".0") + f" {units[0]}"
