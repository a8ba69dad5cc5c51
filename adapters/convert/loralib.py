"""A loralib checkpoint → a PEFT adapter. loralib names `<module>.lora_A` and `.lora_B` without `.weight`, and keeps
neither alpha nor which slices a MergedLinear adapts, so both are asked for.

    Linear         A [r, in]    B [out, r]                  ΔW = alpha/r · B·A
    MergedLinear   A [n·r, in]  B [n·out/m, r]              of m slices n adapted: alpha/r · B_i·A_i, the rest 0
    Embedding      A [r, V]     B [H, r]                    ΔE = alpha/r · Aᵀ·Bᵀ

A MergedLinear becomes one pair of rank n·r whose B is block-diagonal, zero rows where a slice is not adapted. Biases of
`lora_state_dict(bias=…)` are absolute values, as PEFT's are. Source: loralib 0.1, layers.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from adapters.convert.base_outline import BaseOutline
from adapters.convert.conversion import Conversion, RowsOf, SourceDelta
from adapters.convert.failure import CannotConvert
from adapters.convert.lora_pairs import PREFIX, Pair, embedding_tensors, linear_tensors
from adapters.convert.new_config import new_config
from adapters.tensor_names import common_wrapper
from adapters.untrusted_json import shown


@dataclass(frozen=True, slots=True)
class LoralibOptions:
    base_name: str
    alpha: float
    rank: int | None = None  # of one slice
    enable_lora: tuple[bool, ...] | None = None


def looks_like_loralib(names: Sequence[str]) -> bool:
    return any(name.endswith((".lora_A", ".lora_B")) for name in names)


def convert_loralib(tensors: Mapping[str, Tensor], base: BaseOutline, options: LoralibOptions) -> Conversion:
    """Raises CannotConvert naming the tensor when one of them has no place, or another shape than the base gives it."""
    halves, biases = _sort(tensors)
    resolved = base.resolve([*halves, *biases])
    maker = _Maker(base, options)
    for name, halved in halves.items():
        maker.add(resolved[name], _whole(name, halved))
    for name, bias in biases.items():
        maker.add_bias(resolved[name], bias)
    return maker.finish()


class _Maker:
    """The adapter as it grows, module by module."""

    def __init__(self, base: BaseOutline, options: LoralibOptions) -> None:
        self._base, self._options = base, options
        self._tensors: dict[str, Tensor] = {}
        self._deltas: dict[str, SourceDelta] = {}
        self._ranks: dict[str, int] = {}
        self._biases: dict[str, Tensor] = {}

    def add(self, module: str, pair: Pair) -> None:
        if module in self._base.embeddings:
            self._add_embedding(module, pair)
        elif module in self._base.linears:
            self._add_linear(module, pair)
        else:
            raise CannotConvert(f"{module} of the base is neither a linear nor an embedding")

    def add_bias(self, module: str, bias: Tensor) -> None:
        length = self._base.biases.get(module)
        if bias.shape != (length,):
            has = "no bias" if length is None else f"a bias [{length}]"
            raise CannotConvert(f"the bias of {module} is {list(bias.shape)}; the base has {has} there")
        self._biases[module] = bias

    def finish(self) -> Conversion:
        kept = {f"{PREFIX}{self._bias_name(module)}": bias for module, bias in self._biases.items()}
        config = new_config(self._options.base_name, self._ranks) | {"bias": self._bias_kind()}
        return Conversion(config, self._tensors | kept, self._deltas, kept)

    def _bias_name(self, module: str) -> str:
        """PEFT wraps what has LoRA, and the bias is then the wrapped layer's."""
        return f"{module}.base_layer.bias" if module in self._ranks else f"{module}.bias"

    def _bias_kind(self) -> str:
        if not self._biases:
            return "none"
        return "lora_only" if self._biases.keys() <= self._ranks.keys() else "all"

    def _add_embedding(self, module: str, pair: Pair) -> None:
        lora_a, lora_b = pair  # [r, V], [H, r]
        num_embeddings, width = self._base.embeddings[module]
        lora_rank = lora_a.shape[0]
        if lora_a.shape != (lora_rank, num_embeddings) or lora_b.shape != (width, lora_rank):
            raise _bad_shape(module, pair, f"[r, {num_embeddings}] and [{width}, r]")
        scale = self._scale_of(lora_rank, module)
        self._tensors |= embedding_tensors(module, (lora_a, scale * lora_b.float()))
        self._deltas[module] = SourceDelta(num_embeddings, width, _embedding_rows(scale, pair))
        self._ranks[module] = lora_rank

    def _add_linear(self, module: str, pair: Pair) -> None:
        out_features, in_features = self._base.linears[module]
        if pair[0].shape[1] != in_features:
            raise _bad_shape(module, pair, f"A [.., {in_features}]")
        slices = self._slices_of(module, pair, out_features)
        lora_rank = pair[1].shape[1]
        scale = self._scale_of(lora_rank, module)
        lora_b = scale * _spread(pair[1].float(), slices, out_features)  # [out, n·r]
        self._tensors |= linear_tensors(module, (pair[0], lora_b))
        self._deltas[module] = SourceDelta(out_features, in_features, _merged_rows(scale, pair, slices, out_features))
        self._ranks[module] = lora_b.shape[1]

    def _slices_of(self, module: str, pair: Pair, out_features: int) -> tuple[bool, ...]:
        """Which slices are adapted: (True,) for a plain pair."""
        num_rows, lora_rank = pair[0].shape[0], pair[1].shape[1]
        if num_rows == lora_rank and pair[1].shape[0] == out_features:
            return (True,)
        enabled = self._options.enable_lora
        if enabled is None:
            ratio = num_rows // lora_rank if num_rows % lora_rank == 0 else 0
            slices = f"{ratio} slices of its output are adapted; say which" if ratio else "it is no plain pair; say how"
            raise CannotConvert(f"{_shapes(module, pair)}: {slices} (--enable-lora, such as true,false,true)")
        if out_features % len(enabled):
            raise CannotConvert(f"{module} has {out_features} outputs, which {len(enabled)} slices do not divide")
        wanted = sum(enabled) * out_features // len(enabled)
        if num_rows != sum(enabled) * lora_rank or pair[1].shape[0] != wanted:
            text = f"A [{sum(enabled)}·r, {self._base.linears[module][1]}] and B [{wanted}, r] by --enable-lora"
            raise _bad_shape(module, pair, text)
        return enabled

    def _scale_of(self, lora_rank: int, module: str) -> float:
        if self._options.rank not in (None, lora_rank):
            raise CannotConvert(f"{module} has rank {lora_rank}, and --rank says {self._options.rank}")
        return self._options.alpha / lora_rank


def _spread(lora_b: Tensor, slices: tuple[bool, ...], out_features: int) -> Tensor:
    """[n·out/m, r], slice under slice → [out, n·r]: each slice in its own rows and columns, zero elsewhere."""
    height, lora_rank = out_features // len(slices), lora_b.shape[1]
    spread = lora_b.new_zeros(out_features, sum(slices) * lora_rank)
    for i, place in enumerate(place for place, is_enabled in enumerate(slices) if is_enabled):
        block = lora_b[i * height : (i + 1) * height]
        spread[place * height : (place + 1) * height, i * lora_rank : (i + 1) * lora_rank] = block
    return spread


def _merged_rows(scale: float, pair: Pair, slices: tuple[bool, ...], out_features: int) -> Callable[[], RowsOf]:
    """loralib's own way: a convolution in groups over A, and its rows put where the slices are."""

    def make() -> RowsOf:
        lora_a, lora_b = (half.double() for half in pair)
        is_adapted = torch.tensor(slices).repeat_interleave(out_features // len(slices))  # [out]
        dense = lora_a.new_zeros(out_features, lora_a.shape[1])
        merged = functional.conv1d(lora_a.unsqueeze(0), lora_b.unsqueeze(-1), groups=sum(slices))  # [1, n·out/m, in]
        dense[is_adapted] = scale * merged.squeeze(0)
        return lambda begin, end: dense[begin:end]

    return make


def _embedding_rows(scale: float, pair: Pair) -> Callable[[], RowsOf]:
    """loralib's own way: look A's columns up, then B."""

    def make() -> RowsOf:
        table, lora_b = pair[0].T.double(), pair[1].double()  # [V, r], [H, r]

        def rows(begin: int, end: int) -> Tensor:
            return scale * functional.linear(functional.embedding(torch.arange(begin, end), table), lora_b)

        return rows

    return make


def _sort(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """module → its halves, module → its bias."""
    wrapper = common_wrapper(list(tensors))
    halves: dict[str, dict[str, Tensor]] = {}
    biases: dict[str, Tensor] = {}
    for key, tensor in sorted(tensors.items()):
        module, _, part = key[len(wrapper) :].rpartition(".")
        if module and part in ("lora_A", "lora_B") and tensor.ndim == 2:
            halves.setdefault(module, {})[part] = tensor
        elif module and part == "bias" and tensor.ndim == 1:
            biases[module] = tensor
        else:
            raise CannotConvert(
                f"{shown(key)} {list(tensor.shape)} is no lora_A, lora_B or bias of loralib's, and no tensor is left "
                "out; save lora_state_dict(model) alone"
            )
    return halves, biases


def _whole(name: str, halved: Mapping[str, Tensor]) -> Pair:
    if len(halved) != 2:
        missing = "lora_B" if "lora_A" in halved else "lora_A"
        raise CannotConvert(f"{shown(name)} has no {missing}: the checkpoint is incomplete")
    return halved["lora_A"], halved["lora_B"]


def _shapes(module: str, pair: Pair) -> str:
    return f"{module} has A {list(pair[0].shape)} and B {list(pair[1].shape)}"


def _bad_shape(module: str, pair: Pair, wanted: str) -> CannotConvert:
    return CannotConvert(f"{_shapes(module, pair)}; the base needs {wanted}")
