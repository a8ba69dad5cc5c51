"""An adapter's extras as the layers apply them: what it holds, set off against the base it is loaded beside.

Every linear and norm it changes comes down to two vectors (ops/affine_interface.py); the rest is kept as it is. Made
once when an adapter is loaded. Knows the base's biases and norms, and no step.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor, nn

from adapters.adapter_extras import (
    AdapterExtras,
    EmbeddingAdapter,
    ExpertPairs,
    HeadAdapter,
)
from adapters.base_parts import NormShape
from adapters.expert_layout import product_of
from adapters.lora_model import LoRAModel, LoRAWeights
from adapters.module_names import BaseModules
from adapters.ops.affine_interface import ALIGNMENT
from adapters.step_features import NO_FEATURES, StepFeature
from adapters.to_device import moved

_MAX_RATIO = 2.0**16  # of a norm's new parameter to the base's; beyond it, and from 0, the norm is computed anew


@dataclass(frozen=True, slots=True, eq=False)
class AppliedEmbedding:
    part: EmbeddingAdapter
    affine: Tensor | None  # float32 [2, hidden]


@dataclass(frozen=True, slots=True, eq=False)
class AppliedHead:
    part: HeadAdapter
    pair: LoRAWeights | None
    affine: Tensor | None  # float32 [2, V']
    num_columns: int  # of the logits that it reaches


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class AppliedExtras:
    """Maps are by full module name."""

    affines: Mapping[str, Tensor]  # linears and norms → float32 [2, width]: d and c
    input_deltas: Mapping[str, Tensor]  # linears → l - 1, float32 [in_features]
    exact_norms: Mapping[str, Mapping[str, Tensor]]  # norms → weight and bias in place of theirs, in the norm's dtype
    embedding: AppliedEmbedding | None
    head: AppliedHead | None
    num_columns: int | None  # of the logits, where that is more than the base's
    experts: Mapping[str, ExpertPairs]
    routers: Mapping[str, LoRAWeights]

    @property
    def features(self) -> StepFeature:
        held = {
            StepFeature.AFFINE: self.affines,
            StepFeature.INPUT_SCALE: self.input_deltas,
            StepFeature.EXACT_NORM: self.exact_norms,
            StepFeature.EMBEDDING: self.embedding,
            StepFeature.HEAD: self.head,
            StepFeature.WIDE_LOGITS: self.num_columns,
            StepFeature.EXPERTS: self.experts or self.routers,
        }
        found = NO_FEATURES
        for feature, part in held.items():
            if part:
                found |= feature
        return found

    def to_device(self, device: torch.device) -> "AppliedExtras":
        """Itself on the CPU."""
        if device.type == "cpu":
            return self
        return replace(
            self,
            affines=_packed(self.affines, device),
            input_deltas=_packed(self.input_deltas, device),
            exact_norms={name: _packed(parameters, device) for name, parameters in self.exact_norms.items()},
            embedding=moved(self.embedding, device),
            head=moved(self.head, device),
            experts=moved(self.experts, device),
            routers=moved(self.routers, device),
        )


def applied(model: LoRAModel, base_model: nn.Module, base: BaseModules) -> AppliedExtras | None:
    """None for an adapter of low-rank pairs alone. ValueError when it changes what the base does not have, or has in
    another shape."""
    extras = model.extras
    head = None if base.head is None else base.head.name
    routers = {name: model.modules[name] for name in base.routers if name in model.modules}
    if not extras and head not in model.modules and not routers:
        return None
    _check_experts(model, base)
    hosted = {name for name in (head, base.embedding and base.embedding.name) if name}
    affines: dict[str, Tensor] = {}
    for name in dict.fromkeys([*extras.gains, *extras.biases]):
        if name not in hosted:
            width = _width_of(base, name, model)
            affines[name] = _affine(name, extras, _bias_of(base_model, name), width)
    exact: dict[str, Mapping[str, Tensor]] = {}
    for name, parameters in _by_module(extras.norms).items():
        shape = base.norms.get(name)
        if shape is None:
            raise ValueError(f"version {model.version} replaces {name}, which is not a norm of the base")
        vectors = _norm_affine(base_model.get_submodule(name), shape, parameters)
        if vectors is None:
            exact[name] = _like_the_norm(base_model.get_submodule(name), parameters)
        else:
            affines[name] = vectors
    applied_head = _head_of(model, base_model, base)
    found = AppliedExtras(
        affines=_packed(affines, torch.device("cpu")),
        input_deltas=_packed(_input_deltas(model, base), torch.device("cpu")),
        exact_norms=MappingProxyType(exact),
        embedding=_embedding_of(model, base),
        head=applied_head,
        num_columns=_wide(applied_head, base),
        experts=extras.experts,
        routers=MappingProxyType(routers),
    )
    return found if found.features else None


def _check_experts(model: LoRAModel, base: BaseModules) -> None:
    for name, router in base.routers.items():
        found = model.modules.get(name)
        if found is not None and (found.lora_a.shape[1], found.lora_b.shape[1]) != astuple(router):
            raise ValueError(f"version {model.version} has a pair for another router than {name}, which is {router}")
    for name, pairs in model.extras.experts.items():
        shape = base.experts.get(name)
        if shape is None:
            raise ValueError(f"version {model.version} changes {name}, which are no fused experts of the base")
        for pair, is_down in ((pairs.gate_up, False), (pairs.down, True)):
            product = product_of(shape, is_down=is_down)
            wanted = (shape.num_experts, product.in_features, product.out_features)
            if pair is not None and (len(pair.a), pair.a.shape[2], pair.b.shape[2]) != wanted:
                raise ValueError(f"version {model.version} has pairs for other experts than {name}, which are {shape}")


def _width_of(base: BaseModules, name: str, model: LoRAModel) -> int:
    shape = base.linears.get(name)
    if shape is None:
        raise ValueError(f"version {model.version} scales or shifts {name}, which is not a linear of the base")
    return shape.out_features


def _input_deltas(model: LoRAModel, base: BaseModules) -> dict[str, Tensor]:
    deltas = {}
    for name, scale in model.extras.input_scales.items():
        shape = base.linears.get(name)
        if name in model.extras.gains:
            raise ValueError(f"version {model.version} scales inputs and outputs of {name}, which is not served")
        if shape is None or scale.numel() != shape.in_features:
            raise ValueError(f"version {model.version} scales {scale.numel()} inputs of {name}, which is {shape}")
        deltas[name] = scale.float() - 1
    return deltas


def _affine(name: str, extras: AdapterExtras, bias: Tensor | None, width: int) -> Tensor:
    """d = g - 1, and c = δb - d ⊙ b so that the base's bias b stays as it is, unless the gain is to cover it."""
    gain, shift = extras.gains.get(name), extras.biases.get(name)
    if any(vector is not None and vector.numel() != width for vector in (gain, shift)):
        raise ValueError(f"{name} has {width} outputs, and an adapter has vectors of another length for it")
    vectors = torch.zeros(2, width)
    if gain is not None:
        vectors[0] = gain.float() - 1
    if shift is not None:
        vectors[1] = shift.float()
    if bias is not None and gain is not None and name not in extras.gain_covers_bias:
        vectors[1, : len(bias)] -= vectors[0, : len(bias)] * bias
    return vectors


def _bias_of(base_model: nn.Module, name: str) -> Tensor | None:
    bias = base_model.get_submodule(name)._parameters.get("bias")
    return None if bias is None else bias.detach().float().cpu()


def _by_module(norms: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    found: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, parameter in norms.items():
        module, _, own = name.rpartition(".")
        found[module][own] = parameter
    return dict(found)


def _norm_affine(norm: nn.Module, shape: NormShape, parameters: Mapping[str, Tensor]) -> Tensor | None:
    """With ρ = (offset + weight') / (offset + weight): d = ρ - 1 and c = bias' - ρ ⊙ bias, float32 [2, width]; None
    where the base's output does not tell enough."""
    if parameters.keys() - ({"weight", "bias"} if shape.has_bias else {"weight"}):
        raise ValueError(f"a norm of {shape} has no {', '.join(parameters)}")
    if any(tuple(parameter.shape) != shape.shape for parameter in parameters.values()):
        raise ValueError(f"a norm of {shape} met {[tuple(parameter.shape) for parameter in parameters.values()]}")
    own = {name: p.detach().double().cpu() for name, p in norm._parameters.items() if p is not None}
    new = {**own, **{name: parameter.double() for name, parameter in parameters.items()}}
    ratio = (shape.offset + new["weight"]) / (shape.offset + own["weight"])
    if not bool((ratio.abs() <= _MAX_RATIO).all()):  # not: NaN of 0 / 0 compares false
        return None
    shift = new["bias"] - ratio * own["bias"] if shape.has_bias else torch.zeros_like(ratio)
    return torch.stack([ratio - 1, shift]).float().view(2, -1)


def _like_the_norm(norm: nn.Module, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """All its parameters, those replaced converted to the dtype of the norm's."""
    own = {name: p.detach() for name, p in norm._parameters.items() if p is not None}
    return {name: parameters[name].to(p).contiguous() if name in parameters else p for name, p in own.items()}


def _embedding_of(model: LoRAModel, base: BaseModules) -> AppliedEmbedding | None:
    extras, shape = model.extras, base.embedding
    if shape is None:
        if extras.embedding is not None:
            raise ValueError(f"version {model.version} changes the embedding, and none of the base is known")
        return None
    has_vectors = shape.name in extras.gains or shape.name in extras.biases
    if extras.embedding is None and not has_vectors:
        return None
    part = extras.embedding or EmbeddingAdapter()
    values = None if part.rows is None else part.rows.values
    widths = [tensor.shape[1] for tensor in (part.weight, part.lora_b, values) if tensor is not None]
    if any(width != shape.width for width in widths):
        raise ValueError(f"version {model.version} has embeddings of {widths} where the base has {shape.width}")
    return AppliedEmbedding(part, _affine(shape.name, extras, None, shape.width) if has_vectors else None)


def _head_of(model: LoRAModel, base_model: nn.Module, base: BaseModules) -> AppliedHead | None:
    extras, shape = model.extras, base.head
    if shape is None:
        if extras.head is not None:
            raise ValueError(f"version {model.version} changes the head, and none of the base is known")
        return None
    part, pair = extras.head or HeadAdapter(), model.modules.get(shape.name)
    vectors = [table[shape.name] for table in (extras.gains, extras.biases) if shape.name in table]
    if extras.head is None and pair is None and not vectors:
        return None
    bias = part.bias if part.bias is not None else _bias_of(base_model, shape.name)
    affine = _affine(shape.name, extras, bias, vectors[0].numel()) if vectors else None
    reached = [shape.out_features]
    reached += [len(each) for each in (part.weight, part.bias) if each is not None]
    reached += [int(part.rows.ids[-1]) + 1] if part.rows is not None and len(part.rows.ids) else []
    reached += [pair.lora_b.shape[1]] if pair is not None else []
    reached += [affine.shape[1]] if affine is not None else []
    return AppliedHead(part, pair, affine, max(reached))


def _wide(head: AppliedHead | None, base: BaseModules) -> int | None:
    if head is None or base.head is None or head.num_columns <= base.head.out_features:
        return None
    return head.num_columns


def _packed(tensors: Mapping[str, Tensor], device: torch.device) -> Mapping[str, Tensor]:
    """Copies on `device`, in one tensor, so that there is one transfer; each begins where the affine kernels ask."""
    if not tensors:
        return MappingProxyType({})
    padded = [_padded(tensor) for tensor in tensors.values()]
    parts = torch.cat(padded).to(device).split([len(each) for each in padded])
    return MappingProxyType({n: p[: t.numel()].view(t.shape) for (n, t), p in zip(tensors.items(), parts, strict=True)})


def _padded(tensor: Tensor) -> Tensor:
    """[num_elements or a few more], so that what follows it is aligned."""
    return nn.functional.pad(tensor.reshape(-1), (0, -tensor.numel() % (ALIGNMENT // tensor.element_size())))
