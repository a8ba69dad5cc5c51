"""What the `model` field of a request means: one of the base model's served names, an adapter, or `base:adapter`.

Knows nothing of versions or weights.
"""

import difflib
from collections.abc import Sequence
from itertools import islice

from adapters.registry import AdapterRegistry
from adapters.untrusted_json import shown
from server.errors import ModelNotFound

_MAX_COMPARED = 64  # names a miss is compared with: a flood of misses must stay cheap
_MAX_LENGTH_DIFFERENCE = 2
_MAX_NAMED = 3


class ModelNames:
    def __init__(self, base_names: Sequence[str], adapters: AdapterRegistry) -> None:
        self.base_names = tuple(dict.fromkeys(base_names))
        self._longest_first = sorted(self.base_names, key=len, reverse=True)
        self._adapters = adapters

    def resolve(self, model: str) -> str | None:
        """The adapter's registered name, or None for the base model. Raises ModelNotFound.

        Both kinds of names may contain ':', so whole names are tried before `base:adapter`, and of several base names
        that fit the longest first.
        """
        if model in self.base_names:
            return None
        if model in self._adapters:
            return model
        for base in self._longest_first:
            adapter = model.removeprefix(f"{base}:")
            if adapter != model and adapter in self._adapters:
                return adapter
        raise self._not_found(model)

    def _not_found(self, model: str) -> ModelNotFound:
        """Names the base and what may have been mistyped; never the list of adapters, which are other people's."""
        names = [f"`{name}`" for name in dict.fromkeys([*self.base_names, *self._near(model)])]
        served = ", ".join(names)
        return ModelNotFound(f"The model `{shown(model)}` does not exist. Did you mean {served}?", param="model")

    def _near(self, model: str) -> list[str]:
        names = {info.ref.name for info in self._adapters.list()}
        similar = (name for name in sorted(names) if abs(len(name) - len(model)) <= _MAX_LENGTH_DIFFERENCE)
        return difflib.get_close_matches(model, islice(similar, _MAX_COMPARED), n=_MAX_NAMED, cutoff=0.8)
