"""The adapters of one request, leased together and given back together, in the one form that all that follows takes.

Canonical: no two of one version (their weights are summed), none of weight 0, sorted by version; so a request means the
same to the prefix cache however it was written. Knows neither how names are resolved nor what a reply looks like.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from adapters.adapter_facts import AdapterFacts, both_replace
from adapters.adapter_ref import AdapterUse, AdapterVersion, Lease
from server.api.adapter_choice import MAX_WEIGHT
from server.engine.invocation import begin_of
from server.errors import AdapterConflict, BadRequest

COMPOSED = "(composed)"  # in metrics, for requests of several adapters; no adapter can have that name

_MAX_NAMED = 3  # of what two adapters both replace


@dataclass(frozen=True, slots=True)
class HeldAdapter:
    """One lease and the weight that its version has in the request."""

    lease: Lease
    weight: float

    @property
    def name(self) -> str:
        return self.lease.ref.name

    @property
    def version(self) -> AdapterVersion:
        return self.lease.ref.version


class AdapterHold:
    """No adapters at all are the base model. `is_composed`: the request gave weights, or a list of adapters."""

    def __init__(self, adapters: Sequence[HeldAdapter] = (), *, is_composed: bool = False) -> None:
        self.adapters = tuple(adapters)
        self.is_composed = is_composed

    @property
    def leases(self) -> tuple[Lease, ...]:
        return tuple(held.lease for held in self.adapters)

    @property
    def is_revoked(self) -> bool:
        return any(held.lease.is_revoked for held in self.adapters)

    @property
    def label(self) -> str | None:
        """What the request counts under; None = the base model."""
        if len(self.adapters) > 1:
            return COMPOSED
        return self.adapters[0].name if self.adapters else None

    def on_revoked(self, call: Callable[[], object] | None) -> None:
        """`call` when any of the adapters is taken away with its requests."""
        for held in self.adapters:
            held.lease.on_revoked = call

    def release(self) -> None:
        """Idempotent."""
        for held in self.adapters:
            held.lease.release()

    def uses(self, facts: Mapping[AdapterVersion, AdapterFacts], prompt_ids: Sequence[int]) -> tuple[AdapterUse, ...]:
        """What acts on a prompt and all that follows it; not an adapter whose invocation does not stand there."""
        found = []
        for held in self.adapters:
            invocation = facts[held.version].invocation_tokens
            begin = begin_of(prompt_ids, invocation) if invocation else 0
            if begin is not None:
                found.append(AdapterUse(held.version, held.weight, begin))
        return tuple(found)

    def refuse_conflicts(self, facts: Mapping[AdapterVersion, AdapterFacts]) -> None:
        """Raises AdapterConflict when two adapters replace one part of the model: such parts cannot be summed."""
        for left, right in combinations(self.adapters, 2):
            shared = both_replace(facts[left.version], facts[right.version])
            if shared:
                named = ", ".join(f"'{element}'" for element in shared[:_MAX_NAMED])
                more = f" and {len(shared) - _MAX_NAMED} more" if len(shared) > _MAX_NAMED else ""
                raise AdapterConflict(
                    f"The adapters '{left.name}' and '{right.name}' both replace {named}{more} of the base model, and "
                    "replacements cannot be added up; name one of the two.",
                    param="model",
                )


def canonical(taken: Sequence[HeldAdapter]) -> tuple[HeldAdapter, ...]:
    """One entry for each version, by version; the leases it has no use for are given back. Raises BadRequest for a sum
    that no weight may have; all leases are open still then."""
    weights: dict[AdapterVersion, float] = {}
    firsts: dict[AdapterVersion, HeldAdapter] = {}
    for held in taken:
        weights[held.version] = weights.get(held.version, 0.0) + held.weight
        firsts.setdefault(held.version, held)
    for version, weight in weights.items():
        if abs(weight) > MAX_WEIGHT:
            name = firsts[version].name
            raise BadRequest(
                f"The weights of '{name}' add up to {weight:g}; the limit is ±{MAX_WEIGHT:g}.", param="model"
            )
    kept = [HeldAdapter(firsts[version].lease, weights[version]) for version in sorted(weights) if weights[version]]
    leases = {held.lease for held in kept}
    for held in taken:
        if held.lease not in leases:
            held.lease.release()
    return tuple(kept)
