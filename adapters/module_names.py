"""The base's linear modules by name and shape, and the one way a checkpoint's names are mapped onto them.

A name is right exactly as it stands, or after one prefix is exchanged for another in all names alike, or the adapter is
refused: a key that reaches no module is never dropped, since that is how an adapter loads and does nothing. Knows the
shapes of a model, nothing of its weights, and nothing of files.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import nn

from adapters.base_parts import EmbeddingShape, ExpertsShape, FusedPart, HeadShape, NormShape
from adapters.errors import AdapterRefused, RefusalCode
from adapters.untrusted_json import shown

PREFIXES = (
    "",
    "model.",
    "model.language_model.",
    "language_model.",
    "language_model.model.",
    "transformer.",
    "thinker.model.",
)
"""What wraps the same decoder in AutoModel, AutoModelForCausalLM and multimodal classes."""

_NUM_EXAMPLES = 3


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
    fused: Mapping[str, tuple[FusedPart, ...]] = field(default_factory=lambda: MappingProxyType({}))  # by linear


@dataclass(frozen=True, slots=True)
class Resolution:
    """name in the checkpoint → name in the base, and the exchange that was made ("" = none). Names in the base are the
    base's own strings: an adapter keeps them, and a thousand adapters keep no copies."""

    modules: Mapping[str, str]
    rewrite: str = ""


def linears_of(model: nn.Module) -> BaseModules:
    """Walk a base model. A module is a linear if `nn.Linear.forward` or GPT-2's Conv1D computes it.

    Conv1D (weight [in, out]) is known by its class name and its nx, nf, so that transformers is not imported.
    """
    linears: dict[str, LinearShape] = {}
    excluded: dict[str, str] = {}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    for name, module in model.named_modules():
        shape = _shape_of(module)
        why = _why_excluded(name, module, is_output=module is output, embeddings=embeddings)
        if why is not None:
            excluded[name] = why
        elif shape is not None:
            linears[name] = shape
    _exclude_attention_parts(model, linears, excluded)
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    return BaseModules(str(model_type), MappingProxyType(linears), MappingProxyType(excluded))


def resolve(names: Sequence[str], base: BaseModules) -> Resolution:
    """Map every name onto a module of the base. Raises AdapterRefused: adapter_key_unmatched when some reach none,
    adapter_ambiguous_layout when two exchanges fit, adapter_unsupported when a module that is excluded is meant."""
    resolution = _resolve_exactly(names, base) or _resolve_by_prefix(names, base)
    if resolution is None:
        raise _unmatched(names, base)
    for name, module in resolution.modules.items():
        if module in base.excluded:
            raise AdapterRefused(
                RefusalCode.UNSUPPORTED,
                base.excluded[module],
                "Train without it in target_modules",
                feature=f"target_modules={module}",
                tensor=name,
            )
    own = {module: module for module in base.linears}
    return Resolution({name: own[module] for name, module in resolution.modules.items()}, resolution.rewrite)


def _shape_of(module: nn.Module) -> LinearShape | None:
    if isinstance(module, nn.Linear):
        return LinearShape(module.in_features, module.out_features)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nx") and hasattr(module, "nf"):
        weight = module.weight  # [in, out]
        return LinearShape(int(weight.shape[0]), int(weight.shape[1]))  # type: ignore[index]
    return None


def _why_excluded(name: str, module: nn.Module, *, is_output: bool, embeddings: set[int]) -> str | None:
    if isinstance(module, nn.Embedding):
        return "LoRA on embeddings is not served"
    if _shape_of(module) is None:
        return None
    if is_output or name.rpartition(".")[2] == "lm_head" or id(module.weight) in embeddings:
        return "LoRA on the output embeddings (lm_head) is not served"
    if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
        return f"{type(module).__name__} computes more than a linear"
    parts = name.split(".")
    if "experts" in parts:
        return "an expert sees routed tokens, not the rows of the batch"
    if {"visual", "vision_tower", "vision_model", "audio_tower"} & set(parts):
        return "the vision or audio tower is not run for text"
    return None


def _exclude_attention_parts(model: nn.Module, linears: dict[str, LinearShape], excluded: dict[str, str]) -> None:
    """nn.MultiheadAttention reads its children's weights and never calls them: LoRA there would do nothing."""
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            for child in [linear for linear in linears if linear.startswith(f"{name}.")]:
                del linears[child]
                excluded[child] = "nn.MultiheadAttention reads the weight without calling the module"


def _resolve_exactly(names: Sequence[str], base: BaseModules) -> Resolution | None:
    if all(_is_known(name, base) for name in names):
        return Resolution({name: name for name in names})
    return None


def _resolve_by_prefix(names: Sequence[str], base: BaseModules) -> Resolution | None:
    found: dict[str, Resolution] = {}
    for old in PREFIXES:
        if not all(name.startswith(old) for name in names):
            continue
        for new in PREFIXES:
            if not _is_known(new + names[0][len(old) :], base):
                continue
            modules = {name: new + name[len(old) :] for name in names}
            if all(_is_known(module, base) for module in modules.values()):
                found.setdefault(modules[names[0]], Resolution(modules, f"{old}* → {new}*"))
    if len(found) > 1:
        raise AdapterRefused(
            RefusalCode.AMBIGUOUS_LAYOUT,
            f"{shown(names[0])} fits {' and '.join(shown(module) for module in list(found)[:2])} equally well",
            "Rename the tensors so that they carry the base's full module names",
            tensor=names[0],
        )
    return next(iter(found.values()), None)


def _is_known(name: str, base: BaseModules) -> bool:
    return name in base.linears or name in base.excluded


def _unmatched(names: Sequence[str], base: BaseModules) -> AdapterRefused:
    missing = [name for name in names if not _is_known(name, base)]
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
