"""Hand-made adapters with extras of every kind, of random numbers. The oracle is a copy of the base with other weights.

All that adapters change is linear in the base's parameters, so an oracle of several adapters has
W + Σ_k weight_k · (W_k - W) everywhere. Nothing here is computed by the layers under test but names and shapes.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from adapters.adapter_extras import AdapterExtras, EmbeddingAdapter, HeadAdapter, TokenRows
from adapters.adapter_ref import AdapterVersion
from adapters.base_parts import EmbeddingShape, HeadShape
from adapters.lora_model import LoRAModel, LoRAWeights
from adapters.module_names import BaseModules, linears_of
from adapters.norm_sites import norms_of

WIDER, NARROWER = 5, -7  # columns more, or less, than the base's vocabulary


def parts_of(model: nn.Module) -> BaseModules:
    """What adapters may change in `model`."""
    names = {id(module): name for name, module in model.named_modules()}
    lookup: Any = model.get_input_embeddings()  # type: ignore[operator]
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    scale = float(getattr(lookup, "embed_scale", 1.0))
    tied = head.weight.data_ptr() == lookup.weight.data_ptr()
    return replace(
        linears_of(model),
        norms=norms_of(model),
        embedding=EmbeddingShape(names[id(lookup)], *lookup.weight.shape, scale),
        head=HeadShape(names[id(head)], head.in_features, head.out_features, head.bias is not None, tied),
    )


class Draw:
    """Random numbers for one adapter on one base."""

    def __init__(self, model: nn.Module, base: BaseModules, seed: int) -> None:
        self.model, self.base, self.seed = model, base, seed
        self._generator = torch.Generator().manual_seed(seed)
        assert base.embedding is not None and base.head is not None
        self.embedding, self.head = base.embedding, base.head
        self.vocab = base.head.out_features

    def normal(self, *shape: int, std: float = 0.2) -> Tensor:
        return torch.randn(shape, generator=self._generator) * std

    def vectors(self, every: int = 2, *, mean: float = 0.0) -> dict[str, Tensor]:
        """For the outputs of some linears, which differ with the seed."""
        names = [n for i, n in enumerate(self.base.linears) if n != self.head.name and (i + self.seed) % every == 0]
        return {name: mean + self.normal(self.base.linears[name].out_features) for name in names}

    def pairs(self, every: int = 2, rank: int = 4) -> dict[str, LoRAWeights]:
        return {
            name: self.pair(self.base.linears[name].in_features, len(vector), rank)
            for name, vector in self.vectors(every).items()
        }

    def pair(self, in_features: int, out_features: int, rank: int = 4) -> LoRAWeights:
        return LoRAWeights(self.normal(rank, in_features), self.normal(rank, out_features))

    def rows(self, ids: Sequence[int]) -> TokenRows:
        return TokenRows(torch.tensor(ids), self.normal(len(ids), self.embedding.width))

    def made(self, modules: Mapping[str, LoRAWeights] | None = None, **extras: Any) -> LoRAModel:
        found = AdapterExtras(**extras)
        dtype = next(self.model.parameters()).dtype
        modules = {n: LoRAWeights(w.lora_a.to(dtype), w.lora_b.to(dtype)) for n, w in (modules or {}).items()}
        return LoRAModel(AdapterVersion(f"{self.seed}"), modules, extras=found)


def dora(draw: Draw) -> LoRAModel:
    return draw.made(draw.pairs(1), gains=draw.vectors(1, mean=1.0))


def dora_and_bias(draw: Draw) -> LoRAModel:
    return draw.made(draw.pairs(), gains=draw.vectors(mean=1.0), biases=draw.vectors(3))


def ia3(draw: Draw) -> LoRAModel:
    gains = draw.vectors(3, mean=1.0)
    scaled = [name for i, name in enumerate(draw.base.linears) if name not in gains and name != draw.head.name]
    scales = {name: 1 + draw.normal(draw.base.linears[name].in_features) for name in scaled[::2]}
    return draw.made(gains=gains, gain_covers_bias=frozenset(gains), input_scales=scales)


def norms(draw: Draw) -> LoRAModel:
    found = {}
    for name, shape in list(draw.base.norms.items())[draw.seed % 2 :]:
        found[f"{name}.weight"] = draw.normal(*shape.shape) + 1
        if shape.has_bias:
            found[f"{name}.bias"] = draw.normal(*shape.shape)
    return draw.made(draw.pairs(4), norms=found, replaced=frozenset(found))


def embedding_lora(draw: Draw) -> LoRAModel:
    part = EmbeddingAdapter(draw.normal(draw.embedding.num_rows, 3), draw.normal(3, draw.embedding.width))
    return draw.made(draw.pairs(), embedding=part, gains={draw.embedding.name: 1 + draw.normal(draw.embedding.width)})


def embedding_rows(draw: Draw) -> LoRAModel:
    return draw.made(draw.pairs(), embedding=EmbeddingAdapter(rows=draw.rows(range(1, draw.vocab, 3))))


def trained_rows(draw: Draw) -> LoRAModel:
    """Trainable tokens of a tied model: rows of the embedding and of the head."""
    rows = draw.rows(range(0, draw.vocab, 2))
    return draw.made(embedding=EmbeddingAdapter(rows=rows), head=HeadAdapter(rows=rows))


def full_copies(draw: Draw, more: int = 0) -> LoRAModel:
    rows, width = draw.vocab + more, draw.embedding.width
    lookup = EmbeddingAdapter(weight=draw.normal(rows, width))
    head = HeadAdapter(weight=draw.normal(rows, width), bias=draw.normal(rows) if draw.seed % 2 else None)
    return draw.made(draw.pairs(), embedding=lookup, head=head, vocab_size=rows if more else None)


def wider(draw: Draw) -> LoRAModel:
    return full_copies(draw, WIDER)


def narrower(draw: Draw) -> LoRAModel:
    return full_copies(draw, NARROWER)


def new_rows(draw: Draw) -> LoRAModel:
    """Of a resized vocabulary, of which only the new rows differ."""
    rows = draw.rows([3, *range(draw.vocab, draw.vocab + WIDER)])
    return draw.made(embedding=EmbeddingAdapter(rows=rows), head=HeadAdapter(rows=rows), vocab_size=draw.vocab + WIDER)


def head_lora(draw: Draw) -> LoRAModel:
    pairs = {**draw.pairs(), draw.head.name: draw.pair(draw.head.in_features, draw.vocab, 8)}
    return draw.made(pairs, gains={draw.head.name: 1 + draw.normal(draw.vocab)})


def head_bias(draw: Draw) -> LoRAModel:
    return draw.made(biases={draw.head.name: draw.normal(draw.vocab)})


def plain(draw: Draw) -> LoRAModel:
    return draw.made(draw.pairs(1))


KINDS: dict[str, Callable[[Draw], LoRAModel]] = {
    kind.__name__: kind
    for kind in (
        plain, dora, dora_and_bias, ia3, norms, embedding_lora, embedding_rows, trained_rows, full_copies, wider,
        narrower, new_rows, head_lora, head_bias,
    )
}  # fmt: skip


def oracle(model: nn.Module, base: BaseModules, adapters: Sequence[tuple[LoRAModel, float]]) -> nn.Module:
    """A float32 copy of `model` whose own forward gives what the adapters are to give together."""
    changed = untied(model, base, max((a.extras.vocab_size or 0 for a, _ in adapters), default=0))
    before = {name: parameter.clone() for name, parameter in changed.named_parameters()}
    sums = {name: parameter.clone() for name, parameter in before.items()}
    for adapter, weight in adapters:
        alone = untied(model, base, len(before[f"{base.embedding.name}.weight"]))  # type: ignore[union-attr]
        _change(alone, base, adapter)
        for name, parameter in alone.named_parameters():
            sums[name] += weight * (parameter - before[name])
    for name, parameter in changed.named_parameters():
        parameter.copy_(sums[name])
    return changed


def untied(model: nn.Module, base: BaseModules, num_ids: int = 0) -> nn.Module:
    """A copy with a head of its own, a bias everywhere, and rows of zeros up to `num_ids`; its numbers are the same."""
    assert base.embedding is not None and base.head is not None
    found = copy.deepcopy(model).float()
    for name in (base.embedding.name, base.head.name):
        module = found.get_submodule(name)
        old: Any = module.weight
        rows = torch.zeros(max(num_ids, len(old)), old.shape[1])
        rows[: len(old)] = old
        module.weight = nn.Parameter(rows, requires_grad=False)
    found.get_submodule(base.embedding.name).padding_idx = None  # type: ignore[assignment]
    for name in [*base.linears, base.head.name]:
        module = found.get_submodule(name)
        width = len(module.weight) if name == base.head.name else base.linears[name].out_features  # type: ignore[arg-type]
        bias = torch.zeros(width)
        if module.bias is not None:
            bias[: len(module.bias)] = module.bias  # type: ignore[arg-type]
        module.bias = nn.Parameter(bias, requires_grad=False)
    return found


def _change(model: nn.Module, base: BaseModules, adapter: LoRAModel) -> None:
    """Put one adapter's numbers into an untied copy."""
    extras, lookup, head = adapter.extras, base.embedding, base.head
    assert lookup is not None and head is not None
    for name, part in ((lookup.name, extras.embedding), (head.name, extras.head)):
        module: Any = model.get_submodule(name)
        if part is not None and part.weight is not None:
            module.weight[: len(part.weight)] = part.weight.float()
        if part is not None and part.rows is not None:
            module.weight[part.rows.ids] = part.rows.values.float()
    if extras.head is not None and extras.head.bias is not None:
        model.get_submodule(head.name).bias[: len(extras.head.bias)] = extras.head.bias  # type: ignore[index]
    for name, parameter in extras.norms.items():
        model.get_parameter(name).copy_(parameter)
    for name in dict.fromkeys([*extras.gains, *extras.input_scales, *extras.biases, *adapter.modules]):
        _change_linear(model, name, adapter)
    table: Any = model.get_submodule(lookup.name).weight
    part = extras.embedding
    if part is not None and part.lora_a is not None and part.lora_b is not None:
        table[: len(part.lora_a)] += part.lora_a.float() @ part.lora_b.float()


def _change_linear(model: nn.Module, name: str, adapter: LoRAModel) -> None:
    module: Any = model.get_submodule(name)
    extras = adapter.extras
    is_row_major = not isinstance(module, nn.Linear)  # Conv1D [in, out] and embeddings [V, hidden]
    weight = module.weight if is_row_major else module.weight.T  # [in, out]
    gain, scale, bias = (t.get(name) for t in (extras.gains, extras.input_scales, extras.biases))
    if gain is not None:
        weight[:, : len(gain)] *= gain
        if name in extras.gain_covers_bias:
            module.bias[: len(gain)] *= gain
    if scale is not None:
        weight *= scale[:, None]
    if bias is not None:
        module.bias[: len(bias)] += bias
    pair = adapter.modules.get(name)
    if pair is not None:
        weight[:, : pair.lora_b.shape[1]] += pair.lora_a.float().T @ pair.lora_b.float()
