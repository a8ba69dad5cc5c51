"""What is promised of every cell: served, refused with a code, or not there. The one table that changes when the
server learns something: an entry leaves `NOT_YET`, and its cells have to be served from then on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from adapters.errors import RefusalCode as Code
from tests.conformance.models import CONFIGS
from tests.conformance.variants import SUMS, VARIANTS, why_not

NOT_YET: dict[str, Code] = {}
"""Variant → the code it is refused with until it is served. Take an entry out when its cells pass."""

REFUSED: dict[str, tuple[Code, str]] = {
    "pissa": (Code.UNSUPPORTED, "the base was replaced by what the decomposition leaves: `loramux convert`"),
    "olora": (Code.UNSUPPORTED, "the base was replaced by what the decomposition leaves: `loramux convert`"),
    "kasa": (Code.UNSUPPORTED, "the base was replaced by what the decomposition leaves: `loramux convert`"),
}
"""Variant → code and reason, for good."""

ALSO_NEEDS: dict[tuple[str, str], tuple[str, ...]] = {
    ("qwen3_moe", "all_linear"): ("experts", "router"),  # PEFT takes in the fused experts, and what routes to them
    ("mixtral", "all_linear"): ("experts", "router"),
}
"""(architecture, variant) → other variants that it comes down to there."""

TOWERS = (Code.UNSUPPORTED, "on a vision-language model PEFT takes in the tower, which is not run for text")
ROUTERS = (Code.UNSUPPORTED, "on gpt_oss PEFT takes in the biases of the routers, which are not served")
_ALL_BIASES = ("bias_all", "dora_bias", "old_bias_keys")
ELSEWHERE: dict[tuple[str, str], tuple[Code, str]] = {
    **{(architecture, "all_linear"): TOWERS for architecture in ("qwen2_vl", "qwen2_5_vl", "gemma3_vl", "llava")},
    **{(architecture, name): TOWERS for architecture in ("qwen2_vl", "qwen2_5_vl") for name in _ALL_BIASES},
    **{("gpt_oss", name): ROUTERS for name in _ALL_BIASES},
}
"""(architecture, variant) → code and reason, for good, of what is served on others."""


@dataclass(frozen=True)
class Cell:
    """`code` None: served. `absent`: why there is no such adapter."""

    code: Code | None = None
    why: str = ""
    absent: str | None = None

    @property
    def is_served(self) -> bool:
        return self.code is None and self.absent is None


def cell(architecture: str, name: str) -> Cell:
    """What is promised of one variant, or of a sum of variants, which is served when all its parts are."""
    reason = why_not(architecture, name)
    if reason is not None:
        return Cell(absent=reason)
    parts = [part for part, _ in SUMS[name]] if name in SUMS else [name]
    codes = [(code, why) for part in parts for code, why in [_refusal(architecture, part)] if code is not None]
    return Cell(*codes[0]) if codes else Cell()


def _refusal(architecture: str, variant: str) -> tuple[Code | None, str]:
    if variant in REFUSED:
        return REFUSED[variant]
    if (architecture, variant) in ELSEWHERE:
        return ELSEWHERE[architecture, variant]
    missing = [each for each in (variant, *ALSO_NEEDS.get((architecture, variant), ())) if each in NOT_YET]
    return (NOT_YET[missing[0]], "not served yet") if missing else (None, "")


def exists(architecture: str) -> list[str]:
    """Every variant and sum that there is for an architecture."""
    return [name for name in (*VARIANTS, *SUMS) if cell(architecture, name).absent is None]


FULL = ("llama", "qwen2", "gemma2")
NUM_EACH, NUM_ARCHITECTURES = 6, 3


def selection() -> dict[str, list[str]]:
    """Cells of an ordinary test run: all of three architectures; every variant on three where that many have it, and
    at least six on each of the others, spread so that none has many.
    """
    chosen = {architecture: exists(architecture) if architecture in FULL else [] for architecture in CONFIGS}
    for name in (*VARIANTS, *SUMS):
        having = [architecture for architecture in CONFIGS if name in _existing(architecture)]
        missing = NUM_ARCHITECTURES - sum(name in chosen[architecture] for architecture in having)
        spare = sorted((a for a in having if name not in chosen[a]), key=lambda a: len(chosen[a]))
        for architecture in spare[: max(missing, 0)]:
            chosen[architecture].append(name)
    for offset, (architecture, names) in enumerate(chosen.items()):
        _fill(names, _existing(architecture), offset)
    return chosen


def _existing(architecture: str) -> list[str]:
    return _EXISTING.setdefault(architecture, exists(architecture))


_EXISTING: dict[str, list[str]] = {}


def _fill(names: list[str], existing: Sequence[str], offset: int) -> None:
    """Up to NUM_EACH, beginning elsewhere for each architecture; `plain` always."""
    if "plain" not in names:
        names.insert(0, "plain")
    step = 0
    while len(names) < min(NUM_EACH, len(existing)):
        candidate = existing[(7 * offset + 11 * step) % len(existing)]
        step += 1
        if candidate not in names:
            names.append(candidate)
