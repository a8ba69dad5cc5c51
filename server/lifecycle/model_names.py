"""What the `model` field of a request means: one of the base model's served names, an adapter, one version of it
(`name@version`), an alias, or any of these behind `base:`. Knows nothing of weights.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from adapters.adapter_ref import AdapterVersion
from adapters.registry import AdapterRegistry
from adapters.untrusted_json import shown
from server.errors import ModelNotFound
from server.lifecycle.aliases import choose_target
from server.lifecycle.catalogue_records import AliasRecord

_MAX_COMPARED = 64  # names a miss is compared with: a flood of misses must stay cheap
_MAX_LENGTH_DIFFERENCE = 2
_MAX_NAMED = 3


@dataclass(frozen=True, slots=True)
class NamedAdapter:
    """An adapter's registered name; `version` None = what the name stands for now."""

    name: str
    version: AdapterVersion | None = None


class ModelNames:
    def __init__(
        self, base_names: Sequence[str], adapters: AdapterRegistry, aliases: Mapping[str, AliasRecord]
    ) -> None:
        self.base_names = tuple(dict.fromkeys(base_names))
        self._longest_first = sorted(self.base_names, key=len, reverse=True)
        self._adapters = adapters
        self._aliases = aliases

    def resolve(self, model: str, key: str | None = None) -> NamedAdapter | None:
        """What a request with `key` (its user or seed) means, or None for the base model. Raises ModelNotFound.

        All kinds of names may contain ':' and '@', so whole names are tried before parts of them.
        """
        if model in self.base_names:
            return None
        for text in self.candidates(model):
            found = self._named(text, key)
            if found is not None:
                return found
        raise self._not_found(model)

    def candidates(self, model: str) -> list[str]:
        """The names of adapters that `model` may be: itself, and without a base's name, the longest of those first."""
        bases = (f"{base}:" for base in self._longest_first if model.startswith(f"{base}:"))
        return [model, *(model.removeprefix(base) for base in bases)]

    def alias(self, model: str) -> str | None:
        """The alias that `model` is, with a base's name before it or not; None for anything else."""
        if model in self.base_names:
            return None
        known = (text for text in self.candidates(model) if text in self._adapters or text in self._aliases)
        first = next(known, None)
        return None if first in self._adapters else first

    def _named(self, text: str, key: str | None) -> NamedAdapter | None:
        if text in self._adapters:
            return NamedAdapter(text)
        if text in self._aliases:
            target = choose_target(text, self._aliases[text].targets, key)
            return NamedAdapter(target.adapter, target.version) if target.adapter in self._adapters else None
        name, _, digits = text.rpartition("@")
        version = self._adapters.find_version(name, digits)
        return None if version is None else NamedAdapter(name, version)

    def _not_found(self, model: str) -> ModelNotFound:
        """Names the base and what may have been mistyped; never the list of adapters, which are other people's."""
        names = [f"`{name}`" for name in dict.fromkeys([*self.base_names, *self._near(model)])]
        served = ", ".join(names)
        return ModelNotFound(f"The model `{shown(model)}` does not exist. Did you mean {served}?", param="model")

    def _near(self, model: str) -> list[str]:
        similar = (
            name for name in (*self._adapters, *self._aliases) if abs(len(name) - len(model)) <= _MAX_LENGTH_DIFFERENCE
        )
        return difflib.get_close_matches(model, islice(similar, _MAX_COMPARED), n=_MAX_NAMED, cutoff=0.8)
