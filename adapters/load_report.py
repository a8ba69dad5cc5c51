"""What a load found, for people and for the reply to a load request: counts, features, how strong the adapter is.

An adapter that loads and does nothing is the field's usual failure, so the report says what matched and how large the
change is. Knows nothing of files.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from adapters.adapter_extras import AdapterExtras, EmbeddingAdapter, ExpertPair, ExpertPairs
from adapters.lora_model import LoRAModel, LoRAWeights
from adapters.packed_modules import kind_of
from adapters.tensor_runs import NormGroup, grams
from adapters.untrusted_json import shown

_MAX_NAMED = 5
_AT_ONCE = 1 << 20  # elements of experts that are converted together: 4 MiB in float32


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """Bytes are those in host memory, in the compute dtype. `modules` and `delta_norms` are by module kind (q_proj)."""

    modules: Mapping[str, int]
    num_params: int
    num_bytes: int
    lora_rank: int  # the widest
    features: tuple[str, ...]
    delta_norms: Mapping[str, float]
    warnings: tuple[str, ...]
    base_model: str | None  # as the adapter declares it
    stored_dtypes: tuple[str, ...]
    parts: Mapping[str, int] = field(default_factory=dict)  # what there is besides pairs → how many of it
    part_bytes: Mapping[str, int] = field(default_factory=dict)  # also "applied": vectors made of gains, biases, norms
    gain_ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # module kind → least and greatest
    vocab_size: int | None = None  # where it is not the base's
    dropped: tuple[str, ...] = ()  # tensors that change nothing
    ignored: Mapping[str, int] = field(default_factory=dict)  # tensors that the user asked to leave out → bytes

    @property
    def num_modules(self) -> int:
        return sum(self.modules.values())

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "num_modules": self.num_modules,
            "modules": dict(self.modules),
            "num_params": self.num_params,
            "num_bytes": self.num_bytes,
            "lora_rank": self.lora_rank,
            "features": list(self.features),
            "delta_norms": {kind: round(norm, 6) for kind, norm in self.delta_norms.items()},
            "warnings": list(self.warnings),
            "base_model": self.base_model,
            "stored_dtypes": list(self.stored_dtypes),
            "parts": dict(self.parts),
            "part_bytes": dict(self.part_bytes),
            "gain_ranges": {kind: [round(end, 6) for end in ends] for kind, ends in self.gain_ranges.items()},
            "vocab_size": self.vocab_size,
            "dropped": list(self.dropped),
            "ignored": dict(self.ignored),
        }


def module_norms(flat: Tensor, groups: Iterable[NormGroup]) -> tuple[dict[str, float], list[str]]:
    """Module → ‖ΔW‖_F without forming ΔW: ‖BᵀA‖² = tr((B Bᵀ)(A Aᵀ)) with A [r, in] and B [r, out], two [r, r] products.
    Also the modules whose B may be zero everywhere. A value that is not finite makes its module's norm so, too.
    """
    norms, idle, by_rank = dict[str, float](), list[str](), dict[int, list[NormGroup]]()
    for group in groups:
        by_rank.setdefault(group.lora_rank, []).append(group)
    for some in by_rank.values():
        of_a, of_b = zip(*(grams(group, flat) for group in some), strict=True)
        gram_a, gram_b = torch.cat(of_a).double(), torch.cat(of_b).double()  # [n, r, r]
        squares = (gram_a * gram_b).sum((1, 2)).clamp_(min=0.0)  # [n]
        finite = gram_a.sum((1, 2)) + gram_b.sum((1, 2))
        sizes = gram_b.diagonal(dim1=1, dim2=2).sum(1)  # ‖B‖²
        found = torch.stack((torch.where(finite.isfinite(), squares.sqrt(), finite), sizes)).tolist()
        names = [name for group in some for name in group.names]
        norms.update(zip(names, found[0], strict=True))
        idle += [name for name, size in zip(names, found[1], strict=True) if size == 0]
    return norms, idle


def norms_by_kind(norms: Mapping[str, float]) -> dict[str, float]:
    """Module kind → root of the summed squares of its modules, kinds in alphabetical order."""
    squares: Counter[str] = Counter()
    for name, norm in norms.items():
        squares[kind_of(name)] += norm**2  # type: ignore[assignment]
    return {kind: math.sqrt(squares[kind]) for kind in sorted(squares)}


def embedding_norm(embedding: EmbeddingAdapter) -> float:
    """‖A·B‖_F of A [V', r] and B [r, hidden]."""
    if embedding.lora_a is None or embedding.lora_b is None:
        return 0.0
    lora_a, lora_b = embedding.lora_a.float(), embedding.lora_b.float()
    square = ((lora_a.T @ lora_a).double() * (lora_b @ lora_b.T).double()).sum()
    return math.sqrt(square) if square > 0 else float(square)


def expert_norm(experts: Mapping[str, ExpertPairs]) -> float:
    """‖ΔW‖_F over all products of all experts, each b_eᵀ a_e, from [r, r] products as in `module_norms`."""
    total = 0.0
    for pair in _pairs_of(experts):
        at_once = max(1, _AT_ONCE // max(pair.a[0].numel(), pair.b[0].numel(), 1))
        for some_a, some_b in zip(pair.a.split(at_once), pair.b.split(at_once), strict=True):  # [n, r, in], [n, r, out]
            lora_a, lora_b = some_a.float(), some_b.float()
            gram_a, gram_b = lora_a @ lora_a.transpose(1, 2), lora_b @ lora_b.transpose(1, 2)  # [n, r, r]
            total += float((gram_a.double() * gram_b.double()).sum((1, 2)).clamp_(min=0.0).sum())
    return math.sqrt(total)


def _pairs_of(experts: Mapping[str, ExpertPairs]) -> list[ExpertPair]:
    return [pair for of in experts.values() for pair in (of.gate_up, of.down) if pair is not None]


def report_of(
    model: LoRAModel,
    *,
    routers: Collection[str],
    num_params: int,
    base_model: str | None,
    stored_dtypes: Iterable[str],
    warnings: Sequence[str],
    dropped: Sequence[str] = (),
    ignored: Mapping[str, int] | None = None,
) -> LoadReport:
    """`routers`: the modules of the base that are."""
    counts, parts = Counter(kind_of(name) for name in model.modules), _parts_of(model, routers)
    part_bytes = {part: num_bytes for part, (_, num_bytes) in parts.items()}
    if model.extras.num_vector_bytes:
        part_bytes["applied"] = model.extras.num_vector_bytes
    return LoadReport(
        modules=dict(sorted(counts.items())),
        num_params=num_params,
        num_bytes=model.num_bytes,
        lora_rank=model.lora_rank,
        features=model.features,
        delta_norms=model.delta_norms or {},
        warnings=tuple(warnings),
        base_model=base_model,
        stored_dtypes=tuple(sorted(set(stored_dtypes))),
        parts={part: count for part, (count, _) in parts.items()},
        part_bytes=part_bytes,
        gain_ranges=_gain_ranges(model.extras.gains),
        vocab_size=model.extras.vocab_size,
        dropped=tuple(dropped),
        ignored=ignored or {},
    )


def _parts_of(model: LoRAModel, routers: Collection[str]) -> dict[str, tuple[int, int]]:
    """Part → how many of it and their bytes; those that there are. Of experts, a product of all of them is one."""
    extras, experts = model.extras, _pairs_of(model.extras.experts)
    of_routers = [model.modules[name] for name in model.modules if name in routers]
    found: dict[str, tuple[int, list[Tensor | None]]] = {
        "gains": (len(extras.gains), [*extras.gains.values()]),
        "input_scales": (len(extras.input_scales), [*extras.input_scales.values()]),
        "biases": (len(extras.biases), [*extras.biases.values()]),
        "norms": (len(extras.norms), [*extras.norms.values()]),
        "experts": (len(experts), [tensor for pair in experts for tensor in (pair.a, pair.b)]),
        "routers": (len(of_routers), [tensor for pair in of_routers for tensor in (pair.lora_a, pair.lora_b)]),
    }
    if (embedding := extras.embedding) is not None:
        found["embedding_lora"] = (int(embedding.lora_a is not None), [embedding.lora_a, embedding.lora_b])
    if (head := extras.head) is not None:
        found["head_bias"] = (int(head.bias is not None), [head.bias])
    for name, part in (("embedding", extras.embedding), ("head", extras.head)):
        if part is not None:
            found[name] = (int(part.weight is not None), [part.weight])
            ids, values = (None, None) if part.rows is None else (part.rows.ids, part.rows.values)
            found[f"{name}_rows"] = (0 if ids is None else len(ids), [ids, values])
    return {part: (count, sum(map(_num_bytes, tensors))) for part, (count, tensors) in found.items() if count}


def _num_bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


def _gain_ranges(gains: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    ranges: dict[str, tuple[float, float]] = {}
    for name, gain in gains.items():
        least, greatest = (float(end) for end in torch.aminmax(gain))
        before = ranges.get(kind_of(name), (least, greatest))
        ranges[kind_of(name)] = min(least, before[0]), max(greatest, before[1])
    return dict(sorted(ranges.items()))


def absent_targets(listed: Iterable[str], modules: Sequence[str]) -> list[str]:
    """Warnings for what the config lists as targets and the weights do not hold: the other half of the cross-check."""
    targets = [target for target in listed if target != "all-linear"]
    absent = [target for target in targets if not any(_ends_with(module, target) for module in modules)]
    return [f"target_modules lists {_some(absent)}, for which there are no tensors"] if absent else []


def _ends_with(module: str, target: str) -> bool:
    """In whole parts."""
    return module.endswith(target) and (module == target or module[-len(target) - 1] == ".")


def has_effect(extras: AdapterExtras) -> bool:
    """Whether anything but pairs of linears changes anything. Pairs of experts and of the embedding may be zero, and
    invocation tokens only say where pairs act."""
    embedding = extras.embedding
    pairs: list[tuple[Tensor, Tensor]] = [(pair.a, pair.b) for pair in _pairs_of(extras.experts)]
    if embedding is not None and embedding.lora_a is not None and embedding.lora_b is not None:
        pairs.append((embedding.lora_a, embedding.lora_b))
    is_pair_alone = embedding is None or (embedding.rows is None and embedding.weight is None)
    rest = replace(extras, experts={}, embedding=None if is_pair_alone else embedding, invocation_tokens=())
    return bool(rest) or any(bool(lora_a.any()) and bool(lora_b.any()) for lora_a, lora_b in pairs)


def idle_modules(modules: Mapping[str, LoRAWeights], perhaps: Iterable[str], *, has_more: bool) -> list[str]:
    """Warnings for modules without effect. Squares may be zero of values that are not, so those are looked at.
    `has_more`: the adapter changes something besides linears."""
    idle = [name for name in perhaps if not modules[name].lora_b.any()]
    if len(idle) == len(modules) and not has_more:
        return ["every pair is zero: the adapter has no effect"]
    return [f"B is zero, so there is no effect, in {len(idle)} modules: {_some(idle)}"] if idle else []


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(shown(name) for name in names[:_MAX_NAMED]) + more
