"""How long prompts and outputs are: the standard set of workloads, seeded and synthetic, so that nothing is downloaded.

Lengths are in tokens. A prompt has one word a token; the words are such that this holds for usual vocabularies to about
a percent, and the reply's usage says what it came to. Knows nothing of models and of when things are sent.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

Length = Callable[[random.Random], int]
"""Draws one length, in tokens."""

FIXED = "fixed"


@dataclass(frozen=True, slots=True)
class Lengths:
    """The distributions a workload draws each request's prompt and output length from."""

    prompt: Length
    output: Length
    text: str  # for the help and the tables


def _always(tokens: int) -> Length:
    return lambda chance: tokens


def _uniform(low: int, high: int) -> Length:
    return lambda chance: chance.randint(low, high)


def _lognormal(median: float, sigma: float, *, low: int = 4, high: int = 1024) -> Length:
    """Drawn again until it lies in [low, high], as chat data sets are filtered; the mean is of what is left."""

    def draw(chance: random.Random) -> int:
        while not low <= (tokens := round(median * chance.lognormvariate(0, sigma))) <= high:
            pass
        return tokens

    return draw


STANDARD: dict[str, Lengths] = {
    "p1": Lengths(_always(128), _always(512), "decode-heavy, 128 in and 512 out"),
    "p2": Lengths(_lognormal(181.9, 1.0), _lognormal(165.0, 0.9), "like ShareGPT, lognormal, mean 240 in and 220 out"),
    "p3": Lengths(_always(2048), _always(64), "prefill-heavy, 2048 in and 64 out"),
    "p4": Lengths(_uniform(8, 512), _uniform(8, 512), "like S-LoRA's, uniform 8 to 512 in and out"),
}


def draw_lengths(name: str, chance: random.Random, *, prompt: int, output: int, scale: float) -> tuple[int, int]:
    """(prompt, output) tokens of one request, both times `scale`; `prompt` and `output` are what "fixed" has."""
    lengths = Lengths(_always(prompt), _always(output), FIXED) if name == FIXED else STANDARD[name]
    return max(1, round(lengths.prompt(chance) * scale)), max(1, round(lengths.output(chance) * scale))
