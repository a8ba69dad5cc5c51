"""Which of an alias's targets a request gets: by weight, and the same one for the same key. No state.

A key (the user or the seed of a request) is hashed with the alias's name to a point in [0, 1), so its share of the
weights, and with it the target, stays while the weights do; raising one target's weight moves as few keys as can be.
"""

import hashlib
import random
from collections.abc import Sequence
from itertools import pairwise

from adapters.errors import AdapterNameInvalid
from server.lifecycle.catalogue_records import AliasTarget

MAX_TARGETS = 16


def choose_target(alias: str, targets: Sequence[AliasTarget], key: str | None) -> AliasTarget:
    """The target for a request with `key`; a random one, by weight, for one without."""
    if len(targets) == 1:
        return targets[0]
    point = random.random() if key is None else _point(f"{alias}\0{key}")
    bounds = _bounds(targets)
    for target, (low, high) in zip(targets, pairwise(bounds), strict=True):
        if low <= point < high:
            return target
    return max(targets, key=lambda target: target.weight)  # rounding left the last bound under 1


def check_targets(targets: Sequence[AliasTarget]) -> None:
    """Raises AdapterNameInvalid when they are none, too many, or weigh nothing."""
    if not 1 <= len(targets) <= MAX_TARGETS:
        raise AdapterNameInvalid(f"an alias has 1 to {MAX_TARGETS} targets, not {len(targets)}")
    weights = [target.weight for target in targets]
    if any(not 0 <= weight < float("inf") for weight in weights) or sum(weights) <= 0:
        raise AdapterNameInvalid(f"the weights of an alias are 0 or more and not all 0: {weights}")


def _bounds(targets: Sequence[AliasTarget]) -> list[float]:
    total = sum(target.weight for target in targets)
    bounds = [0.0]
    for target in targets:
        bounds.append(bounds[-1] + target.weight / total)
    return bounds


def _point(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7]) / 2**56
