"""Which model each request goes to, and how uneven the outcome was.

Names mean different things in different tools (a "power law of 1" is uniform in S-LoRA's generator), so what was really
sent is always said as the share of the most asked model and of the ten most asked. Knows nothing of requests.
"""

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

Sampler = Callable[[int, int, random.Random], list[int]]
"""(requests, models, chance) → the model's index for each request."""

_DEFAULT_EXPONENTS = {"zipf": 1.0, "power": 1.0}


def _identical(count: int, models: int, chance: random.Random) -> list[int]:
    return [0] * count


def _round_robin(count: int, models: int, chance: random.Random) -> list[int]:
    return [index % models for index in range(count)]


def _uniform(count: int, models: int, chance: random.Random) -> list[int]:
    return [chance.randrange(models) for _ in range(count)]


def _distinct(count: int, models: int, chance: random.Random) -> list[int]:
    if count > models:
        raise ValueError(
            f"distinct popularity gives every request a model of its own, and {count} requests have {models} models; "
            "send fewer, name more, or choose round-robin, which keeps those in flight distinct"
        )
    return chance.sample(range(models), count)


def _zipf(exponent: float) -> Sampler:
    """P(rank k) ∝ 1 / k^exponent over the models there are (bounded), the first named the most popular."""

    def sample(count: int, models: int, chance: random.Random) -> list[int]:
        cumulative = list(itertools.accumulate(1 / (rank + 1) ** exponent for rank in range(models)))
        return chance.choices(range(models), cum_weights=cumulative, k=count)

    return sample


def _power(alpha: float) -> Sampler:
    """S-LoRA's generator: index = ⌊models · u^(1/alpha)⌋, u uniform in [0, 1).

    alpha = 1 is uniform, below 1 prefers the first models, above 1 the last.
    """

    def sample(count: int, models: int, chance: random.Random) -> list[int]:
        return [min(models - 1, int(models * chance.random() ** (1 / alpha))) for _ in range(count)]

    return sample


_PLAIN: dict[str, Sampler] = {
    "identical": _identical,
    "round-robin": _round_robin,
    "uniform": _uniform,
    "distinct": _distinct,
}
_WITH_EXPONENT: dict[str, Callable[[float], Sampler]] = {"zipf": _zipf, "power": _power}
POPULARITIES = (*_PLAIN, "zipf[:s]", "power[:alpha]")


def parse_popularity(text: str) -> Sampler:
    """`uniform`, `zipf`, `zipf:1.5`, `power:0.3`, …; ValueError for anything else."""
    name, colon, exponent = text.partition(":")
    if name in _PLAIN and not colon:
        return _PLAIN[name]
    if name not in _WITH_EXPONENT:
        raise ValueError(f"popularity {text!r} is not one of {', '.join(POPULARITIES)}")
    try:
        value = float(exponent) if colon else _DEFAULT_EXPONENTS[name]
    except ValueError:
        value = -1.0
    if not 0 < value < 100:
        raise ValueError(f"popularity {text!r}: what follows the colon must be a number above 0 and below 100")
    return _WITH_EXPONENT[name](value)


@dataclass(frozen=True, slots=True)
class Shares:
    """How uneven a list of requests was: of all requests, those to the most asked model and to the ten most asked."""

    models: int  # that got at least one request
    top_1: float
    top_10: float

    @classmethod
    def of(cls, models: Iterable[str]) -> "Shares":
        counts = sorted(Counter(models).values(), reverse=True)
        total = sum(counts)
        return cls(len(counts), round(counts[0] / total, 4), round(sum(counts[:10]) / total, 4))

    def __str__(self) -> str:
        return f"{self.models} models asked, top-1 share {self.top_1:.1%}, top-10 share {self.top_10:.1%}"
