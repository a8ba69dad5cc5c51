"""What is sent: which requests to which models, when or how many at once. Seeded, so two runs are equal.

Knows nothing of HTTP and of how replies are measured.
"""

import random
from collections import Counter
from dataclasses import dataclass

from loadtest.arrivals import CLOSED, check_arrivals, schedule
from loadtest.lengths import FIXED, STANDARD, draw_lengths
from loadtest.popularity import Shares, parse_popularity

_WORDS = (
    "river stone paper window garden number letter morning answer winter summer bridge market doctor engine island "
    "mirror pocket silver yellow little second simple always before behind between during except inside kitchen often "
    "people reason should travel under valley without wonder year about carry every found great house large never"
).split()

_WARM_UP_TOKENS = 10


@dataclass(frozen=True, slots=True)
class Call:
    """One request to send. `model_index` is the place of `model` in the workload's list."""

    index: int
    model: str
    model_index: int
    prompt: str
    max_tokens: int
    prompt_tokens: int = 0  # asked for; the reply's usage says how many there were
    send_at: float | None = None  # seconds after the start; None in a closed loop


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """`num_requests` requests in a closed loop, `in_flight` at any time, or in an open loop, `rate` a second.

    `lengths` is "fixed" (`prompt_words` in, `max_tokens` out) or one of the standard set, times `scale`.
    """

    models: tuple[str, ...]
    in_flight: int = 8  # in an open loop: of the warm-up only
    num_requests: int = 32
    prompt_words: int = 64
    max_tokens: int = 64
    popularity: str = "round-robin"
    seed: int = 0
    lengths: str = FIXED
    scale: float = 1.0  # of all lengths
    arrivals: str = CLOSED
    rate: float | None = None  # requests/s
    cv: float = 1.0  # of the gaps between arrivals
    warm_up_requests: int | None = None  # None: each model once and no fewer than in flight

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("a workload needs at least one model; pass --models a,b,…")
        if self.lengths not in (FIXED, *STANDARD):
            raise ValueError(f"lengths {self.lengths!r} is not one of {', '.join((FIXED, *STANDARD))}")
        for name in ("in_flight", "num_requests", "prompt_words", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.scale > 0:
            raise ValueError(f"scale is {self.scale}; it must be above 0")
        if self.warm_up_requests is not None and self.warm_up_requests < 0:
            raise ValueError(f"warm_up_requests is {self.warm_up_requests}; it must not be negative")
        check_arrivals(self.arrivals, self.rate, self.cv)
        self._model_indices()

    @property
    def is_open(self) -> bool:
        """True when requests are sent at their time, whatever became of those before."""
        return self.arrivals != CLOSED

    def calls(self) -> list[Call]:
        """Every request in the order it is sent."""
        moments = self._moments()
        return [self._call(i, chosen, send_at=moments[i]) for i, chosen in enumerate(self._model_indices())]

    def warm_up(self) -> list[Call]:
        """Requests of the workload's prompt lengths, whose prompts the measured ones do not share, ten tokens each."""
        count = self.warm_up_requests
        if count is None:
            count = max(self.in_flight, len(self.models))
        return [self._call(-1 - i, i % len(self.models), max_tokens=_WARM_UP_TOKENS) for i in range(count)]

    def asked(self) -> Counter[str]:
        """Model → how many requests it gets."""
        return Counter(self.models[index] for index in self._model_indices())

    def shares(self) -> Shares:
        return Shares.of(self.models[index] for index in self._model_indices())

    def _moments(self) -> list[float] | list[None]:
        if self.rate is None:
            return [None] * self.num_requests
        return schedule(self.num_requests, arrivals=self.arrivals, rate=self.rate, cv=self.cv, seed=self.seed)

    def _model_indices(self) -> list[int]:
        sample = parse_popularity(self.popularity)
        return sample(self.num_requests, len(self.models), random.Random(self.seed))

    def _call(
        self, index: int, model_index: int, *, max_tokens: int | None = None, send_at: float | None = None
    ) -> Call:
        prompt_tokens, output_tokens = draw_lengths(
            self.lengths,
            random.Random(f"lengths/{self.seed}/{index}"),
            prompt=self.prompt_words,
            output=self.max_tokens,
            scale=self.scale,
        )
        words = random.Random(f"{self.seed}/{index}")
        prompt = " ".join(words.choice(_WORDS) for _ in range(prompt_tokens))
        model = self.models[model_index]
        return Call(index, model, model_index, prompt, max_tokens or output_tokens, prompt_tokens, send_at)
