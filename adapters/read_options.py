"""What whoever loads an adapter says of its files beyond what stands in them. Checked values.

They change what is loaded, so they are part of an adapter's version. Knows nothing of files, sources or routes.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import translate

from adapters.errors import AdapterOptionInvalid, AdapterRefused, RefusalCode
from adapters.untrusted_json import shown

EXPERT_B_LAYOUTS = ("rank_major", "grouped_by_expert")
MAX_PATTERNS = 32
MAX_PATTERN_CHARS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """`ignore`: patterns of tensors to leave out, each once and in alphabetical order; `moe_lora_b_layout`: how B of
    fused experts is stored. Raises AdapterOptionInvalid."""

    ignore: tuple[str, ...] = ()
    moe_lora_b_layout: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "ignore", _checked(self.ignore))
        if self.moe_lora_b_layout not in (None, *EXPERT_B_LAYOUTS):
            value = shown(self.moe_lora_b_layout)
            raise AdapterOptionInvalid(f"moe_lora_b_layout is {' or '.join(EXPERT_B_LAYOUTS)}, not {value}")

    def __bool__(self) -> bool:
        return self != NO_OPTIONS


def _checked(patterns: Sequence[str]) -> tuple[str, ...]:
    if len(patterns) > MAX_PATTERNS:
        raise AdapterOptionInvalid(f"ignore has {len(patterns)} patterns; the limit is {MAX_PATTERNS}")
    for pattern in patterns:
        if not pattern or len(pattern) > MAX_PATTERN_CHARS or not pattern.isprintable():
            raise AdapterOptionInvalid(
                f"a pattern of ignore has 1 to {MAX_PATTERN_CHARS} printable characters; "
                f"this one has {len(pattern)}: {shown(pattern)!r}"
            )
    return tuple(sorted(set(patterns)))


NO_OPTIONS = ReadOptions()


def ignored_among(sizes: Mapping[str, int], patterns: Sequence[str]) -> dict[str, int]:
    """Those of `sizes` (tensor's name → bytes) that are left out. A pattern is of the whole name: `*` is any run of
    characters, dots too, `?` any one, `[ab]` and `[!ab]` one of these or another.

    Raises AdapterRefused naming a pattern that no tensor matches, and where all would be left out.
    """
    ignored: dict[str, int] = {}
    for pattern in patterns:
        matches = re.compile(translate(pattern)).match  # each `*` takes what is next and never goes back: no explosion
        found = {name: size for name, size in sizes.items() if matches(name)}
        if not found:
            raise _refused("no tensor in the files has a name that the pattern matches whole", pattern)
        ignored |= found
    if patterns and len(ignored) == len(sizes):
        raise _refused("the patterns match every tensor in the files, so that nothing would be left", *patterns)
    return dict(sorted(ignored.items()))


def _refused(why: str, *patterns: str) -> AdapterRefused:
    fix = "Correct or remove it: `*` stands for any characters, and names are those of the file"
    feature = f"ignore={shown(', '.join(patterns))}"
    return AdapterRefused(RefusalCode.KEY_UNMATCHED, why, fix, feature=feature)
