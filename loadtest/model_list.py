"""Which models a run is of: named one by one, or read from the server's own list, so that only a number changes
between a run over five adapters and one over a thousand.
"""

import json
from dataclasses import dataclass

from loadtest.client import LoadTestFailed, Target, fetch_text


@dataclass(frozen=True, slots=True)
class ModelList:
    """What GET /v1/models says: a card with a parent is an adapter, one without the base."""

    bases: tuple[str, ...]
    adapters: tuple[str, ...]

    def select(self, num_adapters: int | None, *, with_base: bool) -> tuple[str, ...]:
        """The first `num_adapters` (None: all), then the base where it is wanted or nothing else is left."""
        if num_adapters is not None and not 0 <= num_adapters <= len(self.adapters):
            raise ValueError(
                f"--num-adapters {num_adapters} is not between 0 and the {len(self.adapters)} adapters registered; "
                "register more or ask for fewer"
            )
        chosen = self.adapters[:num_adapters]
        return (*chosen, self.bases[0]) if with_base or not chosen else chosen


async def fetch_models(target: Target) -> ModelList:
    """Raises LoadTestFailed when the server has no such list, or no base model in it."""
    page = await fetch_text(target, "/v1/models")
    if page is None:
        raise LoadTestFailed(f"{target.url} has no list of models at /v1/models; name them with --models")
    cards = json.loads(page)["data"]
    models = ModelList(
        tuple(card["id"] for card in cards if not card.get("parent")),
        tuple(card["id"] for card in cards if card.get("parent")),
    )
    if not models.bases:
        raise LoadTestFailed(f"{target.url} lists no model without a parent, so no base; name the models with --models")
    return models
