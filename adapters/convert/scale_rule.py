"""s of every module from a PEFT config: alpha / r, or alpha / √r with use_rslora, each by its pattern.

Reads no more of the config than that; whether the rest of it is served, the loader says.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from adapters.convert.failure import CannotConvert
from adapters.name_patterns import PatternTable
from adapters.untrusted_json import shown

MAX_NUMBER = 1e9


@dataclass(frozen=True, slots=True)
class ScaleRule:
    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: PatternTable[int]
    alpha_pattern: PatternTable[float]

    @classmethod
    def of(cls, config: Mapping[str, object]) -> "ScaleRule":
        """Raises CannotConvert when a number is missing, AdapterRefused when a pattern cannot be read."""
        ranks = {key: _rank(value) for key, value in _table(config, "rank_pattern").items()}
        alphas = {key: number("alpha_pattern", value) for key, value in _table(config, "alpha_pattern").items()}
        return cls(
            _rank(config.get("r")),
            number("lora_alpha", config.get("lora_alpha")),
            bool(config.get("use_rslora")),
            PatternTable.parse(ranks, field="rank_pattern"),
            PatternTable.parse(alphas, field="alpha_pattern"),
        )

    def rank_of(self, module: str) -> int:
        return self.rank_pattern.lookup(module, self.r)

    def scale_of(self, module: str) -> float:
        lora_rank, alpha = self.rank_of(module), self.alpha_pattern.lookup(module, self.lora_alpha)
        return alpha / (math.sqrt(lora_rank) if self.use_rslora else lora_rank)


def fields_of_scale_one(ranks: Mapping[str, int]) -> dict[str, object]:
    """The config's fields that give every module its rank, and the scale 1."""
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: lora_rank for module, lora_rank in ranks.items() if lora_rank != usual}
    return {
        "r": usual,
        "lora_alpha": usual,
        "use_rslora": False,
        "rank_pattern": others,
        "alpha_pattern": dict(others),
    }


def number(field: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_NUMBER:
        raise CannotConvert(f"{field} is {shown(value)}, and a number is needed")
    return float(value)


def _rank(value: object) -> int:
    if type(value) is not int or value < 1:
        raise CannotConvert(f"a rank in the config is {shown(value)}, and a positive integer is needed")
    return value


def _table(config: Mapping[str, object], name: str) -> dict[str, object]:
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise CannotConvert(f"{name} is {shown(value)}, and a table from modules to numbers is needed")
    return value
