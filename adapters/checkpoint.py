"""An adapter's folder → LoRAModel, or a refusal that names the tensor or field: every tensor is consumed or none is.

The order is the defence: config, headers, names, shapes, rank and size are all settled before the first byte of data
is read; then each tensor is read into private memory, hashed, checked for finite values, scaled and cast. Neither PEFT
nor transformers ever sees the folder. Knows nothing of names, leases or devices.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from adapters.adapter_folder import AdapterFolder
from adapters.adapter_ref import AdapterVersion
from adapters.errors import AdapterRefused, RefusalCode
from adapters.host_memory import ALIGNMENT, HostMemory
from adapters.load_report import LoadReport, absent_targets, idle_modules, module_norms, norms_by_kind, report_of
from adapters.lora_config import CONFIG_NAME, MAX_CONFIG_BYTES, LoRAConfig
from adapters.lora_model import LoRAModel
from adapters.module_names import BaseModules, LinearShape, resolve
from adapters.packed_modules import PackedModules, layout_of
from adapters.safetensors_header import require_matrix
from adapters.tensor_names import read_names
from adapters.weight_files import StoredTensor, open_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointLimits:
    """What one adapter may take; both are checked before anything is allocated for it."""

    max_lora_rank: int
    max_adapter_bytes: int  # of its weight files


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    model: LoRAModel
    report: LoadReport


@dataclass(frozen=True, slots=True)
class _Pair:
    """A and B of one module, not yet read. `source` is the module as the file calls it, `module` as the base does."""

    source: str
    module: str
    lora_a: StoredTensor  # [r, in_features]
    lora_b: StoredTensor  # [out_features, r], PEFT's orientation
    scale: float


def load_lora_model(
    folder: Path | AdapterFolder, base: BaseModules, *, limits: CheckpointLimits, dtype: torch.dtype
) -> LoadedAdapter:
    """Load and check one adapter, its weights in `dtype` on the CPU. A folder that is open already stays open.

    Raises AdapterNotFound when the folder holds no adapter, AdapterRefused (any code) when it cannot be served exactly.
    """
    with AdapterFolder.find(folder) if isinstance(folder, Path) else nullcontext(folder) as place:
        return _load(place, base, limits, dtype)


def _load(place: AdapterFolder, base: BaseModules, limits: CheckpointLimits, dtype: torch.dtype) -> LoadedAdapter:
    with place.open(CONFIG_NAME) as file:
        config = LoRAConfig.parse(file.read(MAX_CONFIG_BYTES + 1))
    with open_weights(place, max_bytes=limits.max_adapter_bytes) as tensors:
        pairs, rewrite = _plan(tensors, config, base, limits)
        version, modules = _read_modules(pairs, config, dtype)
    features = (*config.features, *((f"renamed: {rewrite}",) if rewrite else ()))
    views = dict(modules)
    norms = module_norms(views)
    model = LoRAModel(version, modules, features, _checked_norms(norms))
    warnings = absent_targets(config, (pair.source for pair in pairs)) + idle_modules(views, norms)
    if place.tokenizer_files:
        warnings.append(f"{', '.join(place.tokenizer_files)}: not read, the base's tokenizer and template are used")
    dtypes = (stored.entry.dtype for stored in tensors.values())
    num_params = sum(weights.lora_a.numel() + weights.lora_b.numel() for weights in views.values())
    report = report_of(model, config, num_params=num_params, stored_dtypes=dtypes, warnings=warnings)
    return LoadedAdapter(model, report)


def _plan(
    tensors: Mapping[str, StoredTensor], config: LoRAConfig, base: BaseModules, limits: CheckpointLimits
) -> tuple[list[_Pair], str]:
    """Every tensor's place in the base and every module's scale, from names and shapes alone."""
    halves = _pair_up(tensors)
    for stored in tensors.values():
        require_matrix(stored.entry)
    resolution = resolve(list(halves), base)
    _check_base(halves, resolution.modules, base, config)
    pairs = []
    for source, (lora_a, lora_b) in halves.items():
        module = resolution.modules[source]
        lora_rank = _check_shapes(lora_a, lora_b, module, base.linears[module])
        _check_rank(lora_rank, config.rank_of(source), limits.max_lora_rank, lora_a.entry.name)
        pairs.append(_Pair(source, module, lora_a, lora_b, config.scale_of(source)))
    return pairs, resolution.rewrite


def _pair_up(tensors: Mapping[str, StoredTensor]) -> dict[str, tuple[StoredTensor, StoredTensor]]:
    """module as the file calls it → (A, B), in alphabetical order."""
    found: dict[str, dict[str, StoredTensor]] = {}
    for name in read_names(sorted(tensors)):
        found.setdefault(name.module, {})[name.half] = tensors[name.key]
    for halves in found.values():
        if len(halves) == 1:
            (half, stored), other = next(iter(halves.items())), "lora_B" if "lora_A" in halves else "lora_A"
            raise AdapterRefused(
                RefusalCode.INCOMPLETE_PAIR,
                f"{half} has no {other} beside it, so the module cannot be computed",
                "The file is incomplete: save the adapter again",
                tensor=stored.entry.name,
            )
    return {module: (halves["lora_A"], halves["lora_B"]) for module, halves in sorted(found.items())}


def _check_base(
    halves: Mapping[str, tuple[StoredTensor, StoredTensor]],
    modules: Mapping[str, str],
    base: BaseModules,
    config: LoRAConfig,
) -> None:
    """When of several modules not one fits, the base is the wrong one, and one shape at a time would not say so."""
    fitting = sum(
        lora_a.entry.shape[1] == base.linears[modules[source]].in_features
        and lora_b.entry.shape[0] == base.linears[modules[source]].out_features
        for source, (lora_a, lora_b) in halves.items()
    )
    if fitting or len(halves) < 2:
        return
    source, (lora_a, lora_b) = next(iter(halves.items()))
    wanted = base.linears[modules[source]]
    raise AdapterRefused(
        RefusalCode.WRONG_BASE,
        f"none of {len(halves)} modules has the base's widths: {modules[source]} is {lora_a.entry.shape[1]} → "
        f"{lora_b.entry.shape[0]} in the adapter, {wanted.in_features} → {wanted.out_features} in the base",
        f"The adapter declares the base {config.base_model or 'nowhere'}: serve it on that one",
        feature="base_model_name_or_path",
        tensor=lora_a.entry.name,
    )


def _check_shapes(lora_a: StoredTensor, lora_b: StoredTensor, module: str, shape: LinearShape) -> int:
    """A must be [r, in_features] and B [out_features, r] exactly, padding nothing; returns r."""
    lora_rank = lora_a.entry.shape[0]
    for stored, wanted in (
        (lora_a, (lora_rank, shape.in_features)),
        (lora_b, (shape.out_features, lora_rank)),
    ):
        if stored.entry.shape != wanted:
            raise AdapterRefused(
                RefusalCode.SHAPE_MISMATCH,
                f"the tensor is {list(stored.entry.shape)}; {module} of the base needs {list(wanted)}",
                "Serve the base the adapter was trained on",
                tensor=stored.entry.name,
            )
    return lora_rank


def _check_rank(lora_rank: int, declared: int, max_lora_rank: int, tensor: str) -> None:
    if lora_rank > max_lora_rank:
        raise AdapterRefused(
            RefusalCode.TOO_LARGE,
            f"the adapter has r={lora_rank}, over max_lora_rank={max_lora_rank}",
            f"Restart with --max-lora-rank {lora_rank} or more",
            feature="max_lora_rank",
            tensor=tensor,
        )
    if lora_rank != declared:
        raise AdapterRefused(
            RefusalCode.SHAPE_MISMATCH,
            f"the tensor has rank {lora_rank}, {CONFIG_NAME} says {declared} for it, and the scale hangs on that",
            "Correct r or rank_pattern, or save the adapter again",
            feature=f"r={declared}",
            tensor=tensor,
        )


def _read_modules(
    pairs: Sequence[_Pair], config: LoRAConfig, dtype: torch.dtype
) -> tuple[AdapterVersion, PackedModules]:
    """Read all tensors in the order of their names, each once: hashed as stored, kept as computed with."""
    digest = hashlib.sha256()
    _feed(digest, [config.canonical()])
    modules, scratch = _empty_modules(pairs, dtype), _scratch(pairs)
    views = dict(modules)
    for stored, pair, scale in _in_order(pairs):
        name, data = stored.entry.name, stored.read(scratch)
        shape = ",".join(map(str, stored.entry.shape))
        _feed(digest, [name.encode(), stored.entry.dtype.encode(), shape.encode(), data])
        weights = views[pair.module]
        (weights.lora_a if scale is None else weights.lora_b).copy_(_prepare(stored.as_tensor(data), scale))
    if not modules.flat.abs().amax() < float("inf"):  # NaN is the greatest of all
        _refuse_nonfinite(pairs, dtype)
    return AdapterVersion(digest.hexdigest()), modules


def _scratch(pairs: Iterable[_Pair]) -> memoryview:
    """Room for any one of the tensors, each of which is read into it: a block of memory for each of hundreds costs more
    than reading them, and leaves a heap full of holes.
    """
    return memoryview(bytearray(max(stored.entry.num_bytes for pair in pairs for stored in (pair.lora_a, pair.lora_b))))


def _refuse_nonfinite(pairs: Sequence[_Pair], dtype: torch.dtype) -> None:
    """What is not finite as stored is not finite as computed with either, so all are looked at once, after the scaling;
    only to tell which tensor it is and whether it was so before, each is read again.
    """
    scratch = _scratch(pairs)
    for stored, _, scale in _in_order(pairs):
        name, tensor = stored.entry.name, stored.as_tensor(stored.read(scratch))
        _check_finite(tensor, name, f"as stored ({str(tensor.dtype).removeprefix('torch.')})")
        ready = _prepare(tensor, scale).to(dtype)
        _check_finite(ready, name, f"after scaling and casting to {str(dtype).removeprefix('torch.')}")


def _in_order(pairs: Iterable[_Pair]) -> list[tuple[StoredTensor, _Pair, float | None]]:
    """Every tensor with its pair, in the order of the tensors' names; the scale is B's alone."""
    all_a: list[tuple[StoredTensor, _Pair, float | None]] = [(pair.lora_a, pair, None) for pair in pairs]
    all_b = [(pair.lora_b, pair, pair.scale) for pair in pairs]
    return sorted([*all_a, *all_b], key=lambda item: item[0].entry.name)


def _empty_modules(pairs: Iterable[_Pair], dtype: torch.dtype) -> PackedModules:
    """Room for all modules, in a mapping of its own, so that it is given back with the adapter."""
    entries = ((pair.module, pair.lora_a.entry, pair.lora_b.entry) for pair in pairs)
    shapes = ((module, a.shape[0], a.shape[1], b.shape[0]) for module, a, b in entries)
    layout = layout_of(shapes, align=ALIGNMENT // dtype.itemsize)
    return PackedModules(layout, HostMemory(0).empty(layout.num_elements, dtype=dtype))


def _feed(digest: "hashlib._Hash", parts: Iterable[bytes | memoryview]) -> None:
    """Each part after its length, so that no two adapters feed the same bytes."""
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)


def _prepare(tensor: Tensor, scale: float | None) -> Tensor:
    """A [r, in] as it is; of B [out, r] (scale · B)ᵀ [r, out]. Both in float32, and cast where they are written: torch
    takes twice as long from float16 to bfloat16 directly.
    """
    return tensor.float() if scale is None else (tensor.float() * scale).T


def _check_finite(tensor: Tensor, name: str, when: str) -> None:
    finite = torch.isfinite(tensor)
    if not finite.all():
        count = tensor.numel() - int(finite.sum())
        raise AdapterRefused(
            RefusalCode.NONFINITE,
            f"{count} of {tensor.numel()} values are NaN or infinite {when}",
            "The training diverged or the file is damaged: use an earlier checkpoint",
            tensor=name,
        )


def _checked_norms(by_module: Mapping[str, float]) -> Mapping[str, float]:
    norms = norms_by_kind(by_module)
    for kind, norm in norms.items():
        if not norm < float("inf"):
            raise AdapterRefused(
                RefusalCode.NONFINITE,
                f"ΔW of the {kind} modules overflows float32, and so would every output",
                "The training diverged or the scale is wrong: check lora_alpha",
                tensor=kind,
            )
    return MappingProxyType(norms)
