"""Values of adapter_config.json, each checked for its type and bounds and refused by the name of its field.

Knows JSON values and names of fields, nothing of what they mean.
"""

from collections.abc import Mapping

from adapters.errors import AdapterRefused, RefusalCode
from adapters.untrusted_json import shown

CONFIG_NAME = "adapter_config.json"
MAX_RANK = 1 << 20
MAX_IDS = 1 << 16
"""Token ids in one list; a file that trains more rows than this stores the whole embedding."""
MAX_NAMES = 1024
_MAX_ID = 1 << 31

Fields = Mapping[str, object]


def rank(field: str, value: object) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise bad_value(field, value, "a positive integer")
    return value


def number(field: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e9:
        raise bad_value(field, value, "a number of at most 1e9")
    return float(value)


def flag(field: str, value: object) -> bool:
    if not isinstance(value, bool | None):
        raise bad_value(field, value, "true or false")
    return bool(value)


def table(fields: Fields, name: str) -> list[tuple[str, object]]:
    value = fields.get(name) or {}
    if not isinstance(value, dict):
        raise bad_value(name, value, "a table from module names to numbers")
    return list(value.items())


def names(field: str, value: object) -> tuple[str, ...]:
    """A list of names, or one of them alone, as PEFT takes it in some places. Bounded, since each is compared with the
    name of every module."""
    found = [value] if isinstance(value, str) else value or []
    if not isinstance(found, list) or len(found) > MAX_NAMES or not all(isinstance(item, str) for item in found):
        raise bad_value(field, value, f"a list of at most {MAX_NAMES} names")
    return tuple(found)


def ids(field: str, value: object) -> tuple[int, ...]:
    """Token ids in the order of the file, no two alike."""
    wanted = f"a list of 1 to {MAX_IDS} different integers from 0 to {_MAX_ID}"
    if not isinstance(value, list) or not 0 < len(value) <= MAX_IDS or len(set(map(repr, value))) != len(value):
        raise bad_value(field, value, wanted)
    if not all(type(item) is int and 0 <= item <= _MAX_ID for item in value):
        raise bad_value(field, value, wanted)
    return tuple(value)


def listed(value: object) -> tuple[str, ...]:
    return tuple(item for item in value if isinstance(item, str)) if isinstance(value, list) else ()


def declared(value: object) -> str | None:
    return shown(value) if isinstance(value, str) and value else None


def spelled(name: str, value: object) -> str:
    return f"{shown(name, 80)}={shown(value)}"


def unsupported(feature: str, why: str, fix: str) -> AdapterRefused:
    return AdapterRefused(RefusalCode.UNSUPPORTED, why, fix, feature=feature)


def bad_value(field: str, value: object, wanted: str) -> AdapterRefused:
    said = "is missing" if value is None else f"is {shown(value)}"
    fix = f"Correct {CONFIG_NAME}, or save the adapter again with PEFT"
    return AdapterRefused(RefusalCode.CORRUPT, f"{field} {said}; {wanted} is needed", fix, feature=field)
