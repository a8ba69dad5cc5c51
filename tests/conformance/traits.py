"""What variants ask of an architecture: names and properties read off the model, not off the walk that is tested."""

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.conformance.models import fresh

_TOWERS = ("visual", "vision_tower", "multi_modal_projector")


@dataclass(frozen=True, kw_only=True)
class Traits:
    """`linears`, `norms`, `experts` and `routers` are full module names in the order of the model."""

    architecture: str
    linears: tuple[str, ...]
    biased: tuple[str, ...]  # those of the linears that have a bias
    norms: tuple[str, ...]
    experts: tuple[str, ...]
    routers: tuple[str, ...]  # modules whose weight is [E, hidden]
    embedding: str
    head: str
    vocab_size: int
    is_tied: bool
    is_wrapped: bool  # the text model is one of several
    is_transposed: bool  # GPT-2's Conv1D
    shapes: dict[str, tuple[int, int]]  # linear → (in, out)

    @property
    def leaves(self) -> list[str]:
        """Last parts of the linears, as people write target_modules."""
        return sorted({name.rpartition(".")[2] for name in self.linears})

    @property
    def last_embedding(self) -> str:
        return self.embedding.rpartition(".")[2]

    @property
    def last_head(self) -> str:
        return self.head.rpartition(".")[2]

    def targeting(self, *also: str) -> dict[str, Any]:
        """All linears of the text model by their last parts, and what else is named."""
        towers = {"exclude_modules": rf".*({'|'.join(_TOWERS)}).*"} if self.is_wrapped else {}
        return {"target_modules": [*self.leaves, *also], **towers}


@cache
def traits(architecture: str) -> Traits:
    model: Any = fresh(architecture)
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    text = {name: module for name, module in model.named_modules() if not _is_tower(name)}
    linears = {
        name: module for name, module in text.items() if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    experts = tuple(name for name in text if re.search(r"\.experts$", name))
    return Traits(
        architecture=architecture,
        linears=tuple(linears),
        biased=tuple(name for name, module in linears.items() if module.bias is not None),
        norms=tuple(name for name in text if _is_norm(name)),
        experts=experts,
        routers=tuple(name for name in text if re.search(r"\.mlp\.(gate|router)$", name)) if experts else (),
        embedding=names[id(embedding)],
        head=names[id(head)],
        vocab_size=embedding.num_embeddings,
        is_tied=head.weight is embedding.weight,
        is_wrapped=len(text) < len(list(model.named_modules())),
        is_transposed=any(isinstance(module, Conv1D) for module in linears.values()),
        shapes={name: _shape(module) for name, module in linears.items()},
    )


def _is_tower(name: str) -> bool:
    return any(part in _TOWERS for part in name.split("."))


def _is_norm(name: str) -> bool:
    last = name.rpartition(".")[2].lower()
    return "norm" in last or last.startswith("ln_")


def _shape(module: Any) -> tuple[int, int]:
    rows, columns = module.weight.shape
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)
