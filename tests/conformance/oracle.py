"""What an adapter's logits are, by others: PEFT alone on a base of its own, or dense weights where PEFT is wrong.

One forward over prompt and our tokens shows greedy equality by induction: if at every position the oracle, given our
tokens so far, would pick the token we picked, its own greedy run is ours. Nothing of ours computes here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn

from tests.conformance.models import fresh
from tests.conformance.training import base_of


class Oracle(Protocol):
    def logits(self, ids: Sequence[int], num_prompt_tokens: int) -> Tensor:
        """[num_tokens, vocab] in float32; the prompt is the first `num_prompt_tokens` of `ids`."""
        ...


@dataclass(frozen=True)
class BaseOracle:
    architecture: str

    def logits(self, ids: Sequence[int], num_prompt_tokens: int) -> Tensor:
        del num_prompt_tokens
        return forward(self._model, ids)

    @cached_property
    def _model(self) -> nn.Module:
        return fresh(self.architecture)


@dataclass(frozen=True)
class PeftOracle:
    """PEFT, and nothing else, on a base made for this adapter (PiSSA and KaSA change theirs)."""

    architecture: str
    folder: Path
    vocab_size: int | None = None  # of the base it was trained on, where it is not the base's
    invocation: tuple[int, ...] = ()  # aLoRA: searched for in the prompt alone, as PEFT's generate does
    dtype: torch.dtype = torch.float32  # of the base

    @cached_property
    def model(self) -> Any:
        base: Any = base_of(self.architecture, self.vocab_size)
        return PeftModel.from_pretrained(base.to(self.dtype), self.folder).eval()

    def logits(self, ids: Sequence[int], num_prompt_tokens: int) -> Tensor:
        if not self.invocation:
            return forward(self.model, ids)
        begin = last_begin(ids[:num_prompt_tokens], self.invocation)
        return forward(self.model, ids, alora_offsets=[None if begin is None else len(ids) - begin])


@dataclass(frozen=True)
class DenseOracle:
    """The base with ΔW added to whole parameters, in float64 and rounded once."""

    architecture: str
    deltas: Mapping[str, Tensor] = field(repr=False)  # by parameter name, in the parameter's own layout

    @cached_property
    def _model(self) -> nn.Module:
        model = fresh(self.architecture)
        with torch.no_grad():
            for name, delta in self.deltas.items():
                parameter = model.get_parameter(name)
                parameter.copy_(parameter.double() + delta.double())
        return model

    def logits(self, ids: Sequence[int], num_prompt_tokens: int) -> Tensor:
        del num_prompt_tokens
        return forward(self._model, ids)


def forward(model: Any, ids: Sequence[int], **settings: Any) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(input_ids=torch.tensor([list(ids)]), use_cache=False, **settings).logits
    return logits[0].float()


def last_begin(prompt: Sequence[int], invocation: Sequence[int]) -> int | None:
    """Where `invocation` stands last in `prompt`."""
    width = len(invocation)
    begins = [i for i in range(len(prompt) - width + 1) if tuple(prompt[i : i + width]) == tuple(invocation)]
    return begins[-1] if begins else None
