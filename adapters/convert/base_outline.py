"""The base as a converter needs it: shapes of linears and embeddings, and a checkpoint's names mapped onto them.

Wider than `adapters/module_names.py`: also what cannot be served is known here, since a conversion is right or wrong by
the base's shapes, and whether the result is served is the loader's to say.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from adapters.convert.failure import CannotConvert
from adapters.name_rewrites import PREFIXES
from adapters.untrusted_json import shown


@dataclass(frozen=True, slots=True)
class BaseOutline:
    linears: Mapping[str, tuple[int, int]]  # [out, in], whichever way round it is stored
    embeddings: Mapping[str, tuple[int, int]]  # [V, H]
    biases: Mapping[str, int]  # owner of a `bias`, a norm too → its length
    transposed: frozenset[str]  # linears stored [in, out]: GPT-2's Conv1D
    tied: frozenset[str]  # linears whose weight is an embedding's too

    @classmethod
    def of(cls, model: nn.Module) -> "BaseOutline":
        """Of a model whose weights need not be there (meta device)."""
        linears, embeddings, biases, transposed = {}, {}, {}, set()
        shared = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        tied = {name for name, m in model.named_modules() if isinstance(m, nn.Linear) and id(m.weight) in shared}
        for name, module in model.named_modules():
            bias = module._parameters.get("bias")
            if bias is not None:
                biases[name] = bias.shape[0]
            if isinstance(module, nn.Linear):
                linears[name] = (module.out_features, module.in_features)
            elif isinstance(module, nn.Embedding):
                embeddings[name] = (module.num_embeddings, module.embedding_dim)
            elif hasattr(module, "nx") and hasattr(module, "nf"):
                linears[name] = (int(module.nf), int(module.nx))
                transposed.add(name)
        return cls(linears, embeddings, biases, frozenset(transposed), frozenset(tied))

    def resolve(self, names: Sequence[str]) -> dict[str, str]:
        """name in a checkpoint → name in the base: as it stands, or after one exchange of prefixes in all alike.

        Raises CannotConvert when names reach nothing, or two exchanges fit.
        """
        found = {tuple(renamed): renamed for renamed in self._exchanges(names) if all(map(self._has, renamed))}
        if len(found) > 1:
            raise CannotConvert(f"the names, such as {shown(names[0])}, fit the base in {len(found)} ways")
        if not found:
            raise self._unmatched(names)
        return dict(zip(names, next(iter(found)), strict=True))

    def _exchanges(self, names: Sequence[str]) -> list[list[str]]:
        if all(map(self._has, names)):
            return [list(names)]
        shared = [old for old in PREFIXES if all(name.startswith(old) for name in names)]
        return [[new + name[len(old) :] for name in names] for old in shared for new in PREFIXES]

    def _has(self, name: str) -> bool:
        return name in self.linears or name in self.embeddings or name in self.biases

    def _unmatched(self, names: Sequence[str]) -> CannotConvert:
        missing = [name for name in names if not self._has(name)]
        nearest = difflib.get_close_matches(missing[0][:200], list(self.linears), n=2, cutoff=0.3)
        return CannotConvert(
            f"{len(missing)} of {len(names)} modules are not in the base, such as {shown(missing[0])}; the nearest of "
            f"the base are {', '.join(nearest) or 'none'}. Is it the base (--model) that the adapter was trained on?"
        )
