"""The base's linear modules by name and shape, and the one way a checkpoint's names are mapped onto them.

A name is right exactly as it stands, or after one rule has rewritten all names alike (name_rewrites.py), or the adapter
is refused: a key that reaches no module is never dropped, since that is how an adapter loads and does nothing. Knows
the shapes of a model, nothing of its weights, and nothing of files.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import nn

from adapters.base_parts import EmbeddingShape, ExpertsShape, FusedPart, HeadShape, NormShape
from adapters.errors import AdapterRefused, RefusalCode
from adapters.joint_names import joint_names
from adapters.name_rewrites import Renaming, rewrites
from adapters.untrusted_json import shown

_NUM_EXAMPLES = 3
_TOWERS = frozenset({"visual", "vision_tower", "vision_model", "audio_tower"})


@dataclass(frozen=True, slots=True)
class LinearShape:
    """y [T, out_features] = x [T, in_features] · W, whichever way round W is stored."""

    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class BaseModules:
    """`linears`: every module LoRA may target, by full name; `excluded`: those it may not, name → why. Disjoint.
    `groups`: linears that read one and the same input, such as q, k and v; what is in none stands alone.
    """

    model_type: str
    linears: Mapping[str, LinearShape]
    excluded: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    groups: tuple[tuple[str, ...], ...] = ()
    biased: frozenset[str] = frozenset()  # linears and the head that have a bias
    embedding: EmbeddingShape | None = None
    head: HeadShape | None = None
    norms: Mapping[str, NormShape] = field(default_factory=lambda: MappingProxyType({}))
    experts: Mapping[str, ExpertsShape] = field(default_factory=lambda: MappingProxyType({}))
    routers: Mapping[str, LinearShape] = field(default_factory=lambda: MappingProxyType({}))  # of experts
    head_dims: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))  # of queries and keys, by linear
    fused: Mapping[str, tuple[FusedPart, ...]] = field(default_factory=lambda: MappingProxyType({}))  # by linear
    checkpoint_name: Renaming | None = field(default=None, compare=False)  # a module's name in old files → here


@dataclass(frozen=True, slots=True)
class Resolution:
    """name in the checkpoint → name in the base, and the exchange that was made ("" = none). Names in the base are the
    base's own strings: an adapter keeps them, and a thousand adapters keep no copies."""

    modules: Mapping[str, str]
    rewrite: str = ""


def linears_of(model: nn.Module) -> BaseModules:
    """Walk a base model. A module is a linear if it computes what nn.Linear or GPT-2's Conv1D does.

    Conv1D (weight [in, out]) is known by its class name and its nx, nf, so that transformers is not imported.
    """
    linears: dict[str, LinearShape] = {}
    excluded: dict[str, str] = {}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    decoder = _decoder_of(model)
    for name, module in model.named_modules():
        shape = _shape_of(module)
        why = _why_excluded(name, module, is_output=module is output, embeddings=embeddings, decoder=decoder)
        if why is not None:
            excluded[name] = why
        elif shape is not None:
            linears[name] = shape
    _exclude_attention_parts(model, linears, excluded)
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    return BaseModules(str(model_type), MappingProxyType(linears), MappingProxyType(excluded))


def resolve(names: Sequence[str], base: BaseModules) -> Resolution:
    """Map every name onto a linear of the base. Raises AdapterRefused: adapter_key_unmatched when some reach none,
    adapter_ambiguous_layout when two rules fit, adapter_unsupported when a module that is excluded is meant."""
    resolution = locate(names, base)
    for name, module in resolution.modules.items():
        if module in base.excluded:
            raise AdapterRefused(
                RefusalCode.UNSUPPORTED,
                base.excluded[module],
                "Train without it in target_modules, or leave its tensors out (`ignore`) if they are not needed",
                feature=f"target_modules={module}",
                tensor=name,
            )
    if not all(module in base.linears for module in resolution.modules.values()):
        raise _unmatched(names, base, base.linears.__contains__)
    return resolution


def locate(names: Sequence[str], base: BaseModules) -> Resolution:
    """Map every name onto a part of the base of any kind: a linear, embedding, head, norm or experts module, one expert
    (`experts.7.gate_proj`), a part of a fused linear (`q_proj` of a qkv), a fused linear whose parts the base keeps
    apart (`qkv_proj`), or what is excluded. Raises AdapterRefused:
    adapter_key_unmatched when some reach none, adapter_ambiguous_layout when two rules fit, or two names one place.
    """
    is_known = _Known(base)
    head = base.head.name if base.head is not None else None
    ways = rewrites(names, is_known, head=head, checkpoint_name=base.checkpoint_name)
    if not ways:
        raise _unmatched(names, base, is_known)
    if len(ways) > 1:
        raise _ambiguous(names[0], [way.modules[names[0]] for way in ways[:2]])
    targets: dict[str, str] = {}
    for name, module in ways[0].modules.items():
        if module in targets and targets[module] != name:
            why = f"{shown(targets[module])} and {shown(name)} are both {shown(module)} of the base"
            fix = "Leave one of them: save one adapter per folder"
            raise AdapterRefused(RefusalCode.AMBIGUOUS_LAYOUT, why, fix, tensor=shown(name))
        targets[module] = name
    own = {module: module for module in base.linears}
    return Resolution({name: own.get(module, module) for name, module in ways[0].modules.items()}, ways[0].rule)


def _shape_of(module: nn.Module) -> LinearShape | None:
    if isinstance(module, nn.Linear):
        return LinearShape(module.in_features, module.out_features)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nx") and hasattr(module, "nf"):
        weight = module.weight  # [in, out]
        return LinearShape(int(weight.shape[0]), int(weight.shape[1]))  # type: ignore[index]
    return None


def _why_excluded(name: str, module: nn.Module, *, is_output: bool, embeddings: set[int], decoder: str) -> str | None:
    if isinstance(module, nn.Embedding):
        return "LoRA on embeddings is not served"
    if _shape_of(module) is None:
        return None
    if is_output or name.rpartition(".")[2] == "lm_head" or id(module.weight) in embeddings:
        return "LoRA on the output embeddings (lm_head) is not served"
    if isinstance(module, nn.Linear) and not _computes_a_linear(type(module)):  # type: ignore[arg-type]  # mypy doubts that classes hash
        return f"{type(module).__name__} computes more than a linear"
    if "experts" in name.split("."):
        return "an expert sees routed tokens, not the rows of the batch"
    if not name.startswith(decoder) or not _TOWERS.isdisjoint(name.split(".")):
        return "the vision or audio tower is not run for text"
    return None


@cache
def _computes_a_linear(kind: type[nn.Linear]) -> bool:
    """Whether a subclass with a forward of its own gives what nn.Linear gives, on a trial: Falcon's does."""
    if kind.forward is nn.Linear.forward:
        return True
    trial = nn.Linear(4, 3, device="cpu", dtype=torch.float32)
    x = torch.randn(2, 4, device="cpu")
    with torch.no_grad():
        expected = trial(x)
        try:
            trial.__class__ = kind
            return torch.allclose(trial(x), expected, atol=1e-6)
        except Exception:  # whatever it lacks: it is not a linear and no more
            return False


def _decoder_of(model: nn.Module) -> str:
    """What the names of the text model in a model of several begin with; "" when it is all there is."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if text is config or not hasattr(model, "get_decoder"):
        return ""
    decoder = cast(Any, model).get_decoder()
    return next((f"{name}." for name, module in model.named_modules() if module is decoder and name), "")


def _exclude_attention_parts(model: nn.Module, linears: dict[str, LinearShape], excluded: dict[str, str]) -> None:
    """nn.MultiheadAttention reads its children's weights and never calls them: LoRA there would do nothing."""
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            for child in [linear for linear in linears if linear.startswith(f"{name}.")]:
                del linears[child]
                excluded[child] = "nn.MultiheadAttention reads the weight without calling the module"


class _Known:
    """Whether a name is one of some part of the base."""

    def __init__(self, base: BaseModules) -> None:
        self._base = base
        self._others = {part.name for part in (base.embedding, base.head) if part is not None}
        for linear, parts in base.fused.items():
            outer = linear.rpartition(".")[0]
            self._others.update(f"{outer}.{part.name}" for part in parts)
        self._others.update(joint_names(base.linears))

    def __call__(self, name: str) -> bool:
        base = self._base
        if name in base.linears or name in base.excluded or name in self._others:
            return True
        return name in base.norms or name in base.experts or name in base.routers or self._is_expert(name)

    def _is_expert(self, name: str) -> bool:
        """`….experts.7.gate_proj`, where the base holds all experts in one module."""
        parts = name.rsplit(".", 2)
        if len(parts) != 3 or parts[0] not in self._base.experts or not parts[1].isascii() or not parts[1].isdigit():
            return False
        return len(parts[1]) < 6 and int(parts[1]) < self._base.experts[parts[0]].num_experts


def _ambiguous(name: str, modules: Sequence[str]) -> AdapterRefused:
    return AdapterRefused(
        RefusalCode.AMBIGUOUS_LAYOUT,
        f"{shown(name)} fits {' and '.join(shown(module) for module in modules)} equally well",
        "Rename the tensors so that they carry the base's full module names",
        tensor=name,
    )


def _unmatched(names: Sequence[str], base: BaseModules, is_known: Callable[[str], bool]) -> AdapterRefused:
    missing = [name for name in names if not is_known(name)]
    examples = missing[:_NUM_EXAMPLES]
    nearest = _nearest(examples, base)
    return AdapterRefused(
        RefusalCode.KEY_UNMATCHED,
        f"{len(missing)} of {len(names)} targeted modules are not in the base ({base.model_type}), "
        f"such as {', '.join(shown(name) for name in examples)}",
        f"The nearest modules of the base are {', '.join(nearest) or 'none'}: serve the base the adapter was "
        "trained on, or rename its tensors",
        tensor=shown(missing[0]),
    )


def _nearest(names: Iterable[str], base: BaseModules) -> list[str]:
    """The closest module for each name; sought among those with the same last part first, as difflib is slow."""
    nearest: dict[str, None] = {}
    for name in names:
        tail = name.rpartition(".")[2]
        pool = [module for module in base.linears if module.rpartition(".")[2] == tail] or list(base.linears)
        for module in difflib.get_close_matches(name[:200], pool[:500], n=1, cutoff=0.3):
            nearest[module] = None
    return list(nearest)
