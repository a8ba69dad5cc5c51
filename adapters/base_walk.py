"""A base model → BaseModules: everything an adapter may change, by name and shape, read off the live modules.

Linears are found by module_names.linears_of; this adds the input embedding with its scale, the head with its tie, who
has a bias, fused experts, and which rows of a wider linear are q, k and v. What has another form than those known here
has no entry, and an adapter that wants it is refused. Knows no weights, files or adapters, and does not import
transformers: modules and configs are known by what they have.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from adapters.base_parts import EmbeddingShape, ExpertsShape, FusedPart, HeadShape, Rows
from adapters.expert_sites import calls_linear
from adapters.module_names import BaseModules, LinearShape, linears_of
from adapters.norm_sites import norms_of


def modules_of(model: nn.Module) -> BaseModules:
    """All that adapters may change in `model`. `groups` is left to who watches a forward pass."""
    base = linears_of(model)
    names = {id(module): name for name, module in model.named_modules()}
    embedding = _embedding_of(model, names)
    head = _head_of(model, names)
    biased = {name for name in base.linears if model.get_submodule(name).bias is not None}
    if head is not None and head.has_bias:
        biased.add(head.name)
    return replace(
        base,
        embedding=embedding,
        head=head,
        biased=frozenset(biased),
        norms=norms_of(model),
        experts=MappingProxyType(dict(_experts_of(model))),
        routers=MappingProxyType(dict(_routers_of(model))),
        head_dims=MappingProxyType(dict(_head_dims_of(model, base.linears))),
        fused=MappingProxyType(dict(_fused_of(model, base.linears))),
    )


def _embedding_of(model: nn.Module, names: Mapping[int, str]) -> EmbeddingShape | None:
    """None where the lookup is not rows of `weight`, all times one number."""
    module = getattr(model, "get_input_embeddings", lambda: None)()
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        return None
    scale = _scale_of(module)
    if scale is None:
        return None
    return EmbeddingShape(names[id(module)], module.num_embeddings, module.embedding_dim, scale)


def _scale_of(module: nn.Embedding) -> float | None:
    """What a lookup is multiplied by; the buffer of Gemma's has no value on the meta device, its float has."""
    if type(module).forward is nn.Embedding.forward:
        return 1.0
    scale = getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", None))
    return None if scale is None else float(scale)


def _head_of(model: nn.Module, names: Mapping[int, str]) -> HeadShape | None:
    module = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        return None
    lookup = getattr(model, "get_input_embeddings", lambda: None)()
    tied = isinstance(lookup, nn.Embedding) and _is_one(module.weight, lookup.weight)
    has_bias = module.bias is not None
    return HeadShape(names[id(module)], module.in_features, module.out_features, has_bias, tied)


def _is_one(left: Tensor, right: Tensor) -> bool:
    """Tied by what they are, not by what the config says: the same parameter, or the same memory."""
    return left is right or (left.device.type != "meta" and left.data_ptr() == right.data_ptr())


def _experts_of(model: nn.Module) -> Iterator[tuple[str, ExpertsShape]]:
    """Modules with gate_up_proj and down_proj of three dimensions that say how they store them."""
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        gate_up, down = own.get("gate_up_proj"), own.get("down_proj")
        if gate_up is None or down is None or gate_up.ndim != 3 or down.ndim != 3:
            continue
        if not (hasattr(module, "is_transposed") and hasattr(module, "is_concatenated")):
            continue
        if not getattr(module, "has_gate", True) or getattr(module, "has_post_expert_norm", False):
            continue
        transposed = bool(module.is_transposed)
        num_experts, *shape = gate_up.shape  # [E, 2·intermediate, hidden], the last two swapped where transposed
        hidden, doubled = shape if transposed else reversed(shape)
        intermediate = doubled // 2
        wanted = (intermediate, hidden) if transposed else (hidden, intermediate)
        if doubled % 2 == 0 and tuple(down.shape) == (num_experts, *wanted):
            yield name, ExpertsShape(num_experts, hidden, intermediate, transposed, not module.is_concatenated)


def _routers_of(model: nn.Module) -> Iterator[tuple[str, LinearShape]]:
    """Modules that choose experts by a product of their own weight [E, hidden]."""
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.ndim == 2 and hasattr(module, "top_k") and calls_linear(module):
            yield name, LinearShape(weight.shape[1], weight.shape[0])


def _head_dims_of(model: nn.Module, linears: Mapping[str, LinearShape]) -> Iterator[tuple[str, int]]:
    """Linears whose outputs are heads of queries or keys that stand apart."""
    for name, shape in linears.items():
        parent, _, last = name.rpartition(".")
        head_dim = getattr(model.get_submodule(parent), "head_dim", None) if last in ("q_proj", "k_proj") else None
        if isinstance(head_dim, int) and head_dim > 0 and shape.out_features % head_dim == 0:
            yield name, head_dim


def _fused_of(model: nn.Module, linears: Mapping[str, LinearShape]) -> Iterator[tuple[str, tuple[FusedPart, ...]]]:
    """Linears whose outputs are those of several that other models keep apart."""
    for name, shape in linears.items():
        parent, _, last = name.rpartition(".")
        sizes = _sizes(model.get_submodule(parent), last, shape.out_features)
        if sizes is not None and _num_rows(sizes) == shape.out_features:
            yield name, tuple(FusedPart(part, rows) for part, rows in sizes.items())


def _sizes(owner: nn.Module, last: str, out_features: int) -> dict[str, Rows] | None:
    """Part → its rows, by the class that cuts the product; a class with another way of cutting is not known."""
    kind = type(owner).__name__
    config = getattr(owner, "config", None)
    if kind == "Phi3MLP" and last == "gate_up_proj":
        return _in_order(gate_proj=out_features // 2, up_proj=out_features // 2)
    if kind == "Phi3Attention" and last == "qkv_proj":
        head_dim: Any = getattr(owner, "head_dim", 0)
        queries, others = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim  # type: ignore[union-attr]
        return _in_order(q_proj=queries, k_proj=others, v_proj=others)
    if last != "c_attn" or getattr(owner, "is_cross_attention", False):
        return None
    if kind == "GPT2Attention":
        return _in_order(q_proj=out_features // 3, k_proj=out_features // 3, v_proj=out_features // 3)
    if kind.startswith("GPTBigCode"):
        width, head_dim = int(owner.embed_dim), int(owner.head_dim)  # type: ignore[arg-type]
        if owner.multi_query:
            return _in_order(q_proj=width, k_proj=head_dim, v_proj=head_dim)
        return _by_head(width // head_dim, head_dim)
    return None


def _in_order(**sizes: int) -> dict[str, Rows]:
    rows: dict[str, Rows] = {}
    begin = 0
    for part, size in sizes.items():
        rows[part] = ((begin, begin + size),)
        begin += size
    return rows


def _by_head(num_heads: int, head_dim: int) -> dict[str, Rows]:
    """q, k and v of the first head, then those of the second, …"""
    starts = {part: i * head_dim for i, part in enumerate(("q_proj", "k_proj", "v_proj"))}
    return {
        part: tuple((3 * head_dim * h + at, 3 * head_dim * h + at + head_dim) for h in range(num_heads))
        for part, at in starts.items()
    }


def _num_rows(sizes: Mapping[str, Rows]) -> int:
    return sum(end - begin for rows in sizes.values() for begin, end in rows)
