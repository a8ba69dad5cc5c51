"""The base's weights with the rows that an adapter puts in their place: what its own gains are computed from."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.adapter_extras import TokenRows
from adapters.base_weights import BaseWeights


@dataclass(frozen=True, slots=True)
class ReplacedRows:
    """BaseWeights, some rows of which are others; keys are names of parameters."""

    base: BaseWeights
    replacing: Mapping[str, TokenRows]
    wholes: Mapping[str, Tensor]

    @property
    def fingerprint(self) -> str:
        return self.base.fingerprint

    def shape(self, parameter: str) -> tuple[int, ...] | None:
        return self.base.shape(parameter)

    def rows(self, parameter: str, begin: int, end: int) -> Tensor:
        """[end - begin, in] float32."""
        if parameter in self.wholes:
            found = self.wholes[parameter][begin:end].float()
        else:
            found = self._of_base(parameter, begin, end)
        replacing = self.replacing.get(parameter)
        if replacing is not None:
            inside = (replacing.ids >= begin) & (replacing.ids < end)  # [n]
            found = found.clone()
            found[replacing.ids[inside] - begin] = replacing.values[inside].float()
        return found

    def _of_base(self, parameter: str, begin: int, end: int) -> Tensor:
        """Rows past the base's are zero; each is among those that replace."""
        shape = self.base.shape(parameter)
        assert shape is not None, f"the base has no {parameter}"
        inside = max(begin, min(end, shape[0]))
        found = self.base.rows(parameter, begin, inside) if inside > begin else torch.zeros(0, *shape[1:])
        return torch.nn.functional.pad(found, (0, 0, 0, end - inside))
