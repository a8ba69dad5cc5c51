"""Strict JSON from files nobody vouches for: the one place where bytes of an adapter's folder become Python values.

Stricter than `json.loads`: an object that names a key twice, NaN and infinities (also by overflow, 1e999), bytes that
are not UTF-8, and nesting past a limit are refused, because each is read differently by different readers. Also here:
how a text from a file is shown to people. Knows nothing of what the values mean.
"""

import json
import math
from collections.abc import Iterable
from typing import NoReturn

from adapters.errors import AdapterRefused, RefusalCode

MAX_DEPTH = 16
"""Nesting of lists and objects; PEFT's own configs reach 3."""


def shown(value: object, limit: int = 160) -> str:
    """A value from a file as one short line of printable ASCII: what enters messages, reports and logs."""
    text = value if isinstance(value, str) else repr(value)
    clipped = text if len(text) <= limit else f"{text[: limit - 1]}…"
    return "".join(c if c == "…" or " " <= c <= "~" else ascii(c)[1:-1] for c in clipped)


def parse_object(data: bytes, *, what: str) -> dict[str, object]:
    """The JSON object in `data`, keys in file order. Raises AdapterRefused (adapter_corrupt) for anything else."""
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object_without_duplicates,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
        )
    except RecursionError:
        raise corrupt(what, f"is nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:  # includes JSONDecodeError, UnicodeDecodeError and ints of over 4300 digits
        raise corrupt(what, f"is not strict JSON: {shown(str(error))}") from None
    if not isinstance(value, dict):
        raise corrupt(what, f"is a JSON {type(value).__name__}, not an object")
    if _is_deeper_than(value, MAX_DEPTH):
        raise corrupt(what, f"is nested deeper than {MAX_DEPTH} levels")
    return value


def corrupt(what: str, why: str) -> AdapterRefused:
    return AdapterRefused(RefusalCode.CORRUPT, f"{what} {why}", "Save the adapter again", feature=what)


def _object_without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(repeated)!r} stands twice in one object")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{shown(text)} is past the largest double")
    return value


def _is_deeper_than(value: object, limit: int) -> bool:
    level: list[object] = [value]
    for _ in range(limit):
        level = [child for parent in level for child in _children(parent)]
    return bool(level)


def _children(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()
