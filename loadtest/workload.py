"""What is sent: how many requests, which prompt and which model each, how many at once. Seeded, so two runs are equal.

Knows nothing of HTTP and of how replies are measured.
"""

import random
from collections import Counter
from dataclasses import dataclass

_WORDS = (
    "river stone paper window garden number letter morning answer winter summer bridge market doctor engine island "
    "mirror pocket silver yellow little second simple always before behind between during except inside kitchen often "
    "people reason should travel under valley without wonder year about carry every found great house large never"
).split()

POPULARITIES = ("round-robin", "zipf")
_ZIPF_EXPONENT = 1.0


@dataclass(frozen=True, slots=True)
class Call:
    """One request to send. `model_index` is the place of `model` in the workload's list."""

    index: int
    model: str
    model_index: int
    prompt: str
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A closed loop: `in_flight` requests at any time until `num_requests` are done."""

    models: tuple[str, ...]
    in_flight: int = 8
    num_requests: int = 32
    prompt_words: int = 64
    max_tokens: int = 64
    popularity: str = "round-robin"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("a workload needs at least one model; pass --models a,b,…")
        if self.popularity not in POPULARITIES:
            raise ValueError(f"popularity {self.popularity!r} is not one of {', '.join(POPULARITIES)}")
        for name in ("in_flight", "num_requests", "prompt_words", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    def calls(self) -> list[Call]:
        """Every request in the order it is sent."""
        chooser = random.Random(self.seed)
        return [self._call(index, self._model_index(index, chooser)) for index in range(self.num_requests)]

    def warm_up(self) -> list[Call]:
        """As many requests as fit at once, with prompts that the measured ones do not share, ten tokens each."""
        count = max(self.in_flight, len(self.models))
        return [self._call(-1 - i, i % len(self.models), max_tokens=10) for i in range(count)]

    def asked(self) -> Counter[str]:
        """Model → how many requests it gets."""
        return Counter(call.model for call in self.calls())

    def _call(self, index: int, model_index: int, max_tokens: int | None = None) -> Call:
        words = random.Random(f"{self.seed}/{index}")
        prompt = " ".join(words.choice(_WORDS) for _ in range(self.prompt_words))
        return Call(index, self.models[model_index], model_index, prompt, max_tokens or self.max_tokens)

    def _model_index(self, index: int, chooser: random.Random) -> int:
        if self.popularity == "round-robin":
            return index % len(self.models)
        weights = [1 / (rank + 1) ** _ZIPF_EXPONENT for rank in range(len(self.models))]
        return chooser.choices(range(len(self.models)), weights)[0]
