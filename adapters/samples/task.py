"""What a sample task is: seeded items, a held-out split and a scorer.

Knows no model, no tokenizer and no particular task.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "held-out"]

# Added to the seed of the held-out split, so that equal seeds never give equal draws.
_HELD_OUT_OFFSET = 1_000_003

# So many draws in a row without a new prompt mean that there is none left.
_PATIENCE = 2000


@dataclass(frozen=True)
class Item:
    """One user message and the answer a perfect model gives to it.

    `facts` holds what the scorer needs besides the answer, as a plain string.
    """

    prompt: str
    answer: str
    facts: str = ""


@dataclass(frozen=True)
class Task:
    """A named task: how to draw one item, and how to score a model's reply to it.

    `score` returns one number between 0 and 1 per metric; the first metric is the
    headline one. `max_new_tokens` leaves a correct answer ample room.
    """

    name: str
    draw: Callable[[random.Random, Split], Item]
    score: Callable[[Item, str], dict[str, float]]
    max_new_tokens: int

    def items(self, split: Split, count: int, seed: int) -> list[Item]:
        """Draw `count` items; the held-out ones have pairwise different prompts."""
        rng = random.Random(seed + (_HELD_OUT_OFFSET if split == "held-out" else 0))
        if split == "train":
            return [self.draw(rng, split) for _ in range(count)]
        return self._distinct(rng, split, count)

    def _distinct(self, rng: random.Random, split: Split, count: int) -> list[Item]:
        found: dict[str, Item] = {}
        stale = 0
        while len(found) < count:
            item = self.draw(rng, split)
            stale = stale + 1 if item.prompt in found else 0
            found.setdefault(item.prompt, item)
            if stale == _PATIENCE:
                raise ValueError(
                    f"task {self.name!r} has only {len(found)} different {split} items, {count} were "
                    f"asked for: ask for at most {len(found)} or extend its word lists"
                )
        return list(found.values())
