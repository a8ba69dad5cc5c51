"""Runs a LoadPlan: every tensor read once, hashed as stored, and kept as computed with.

What only changes dtype and orientation is copied by runs; what is folded, or needs the base's weights, is computed from
tensors set aside. Knows nothing of names, formats or configs.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.adapter_extras import AdapterExtras
from adapters.adapter_folder import OpenFile
from adapters.adapter_ref import AdapterVersion
from adapters.base_weights import BaseWeights
from adapters.errors import AdapterRefused, RefusalCode
from adapters.host_memory import HostMemory
from adapters.load_plan import LoadPlan
from adapters.load_report import module_norms
from adapters.packed_modules import PackedModules
from adapters.run_extras import check_finite, run_extras
from adapters.run_sources import Kept, Sources
from adapters.tensor_pieces import PIECE_BYTES, Piece, read_piece, tensor_in
from adapters.tensor_runs import copy_run

Progress = Callable[[int, int], object]
"""Told of how many rows of the base have their norms, and of how many will, by loads that take seconds."""


@dataclass(frozen=True, slots=True)
class Ran:
    """`norms`: module → ‖ΔW‖; `idle`: modules whose B may be zero; `dropped`: tensors that are as the base has them."""

    version: AdapterVersion
    modules: PackedModules
    extras: AdapterExtras
    norms: Mapping[str, float]
    idle: tuple[str, ...]
    dropped: tuple[str, ...]


def run(
    plan: LoadPlan,
    files: Sequence[OpenFile],
    canonical: bytes,
    dtype: torch.dtype,
    *,
    weights: BaseWeights | None = None,
    max_full_bytes: int = 1 << 62,
    progress: Progress | None = None,
) -> Ran:
    """`canonical`: the config's part of the version. Raises AdapterRefused: nonfinite, too_large, and wrong_base where
    the base's weights are needed and not given."""
    _require_weights(plan, weights)
    digest = hashlib.sha256()
    _feed(digest, (canonical, plan.declared))
    modules = PackedModules(plan.layout, HostMemory(0).empty(plan.layout.num_elements, dtype=dtype))
    kept = _read(plan, files, digest, modules.flat)
    sources = Sources(plan, kept, dtype, weights, max_full_bytes, progress)
    extras, dropped = run_extras(sources, modules)
    norms, idle = module_norms(modules.flat, plan.norm_groups)
    if not all(map(math.isfinite, norms.values())):
        _refuse_nonfinite(plan, files, modules)
    return Ran(AdapterVersion(digest.hexdigest()), modules, extras, norms, tuple(idle), dropped)


def _require_weights(plan: LoadPlan, weights: BaseWeights | None) -> None:
    if weights is None and plan.placement.needs_weights:
        raise AdapterRefused(
            RefusalCode.WRONG_BASE,
            "the adapter is computed from the base's own weights, which are not at hand here",
            "Load it in a server of that base",
            feature="base_weights",
        )


def _read(plan: LoadPlan, files: Sequence[OpenFile], digest: "hashlib._Hash", flat: Tensor) -> Kept:
    """All pieces, hashed; what runs copy is in `flat` then, the rest is returned."""
    kept: Kept = {}
    for piece, runs in zip(plan.pieces, plan.runs, strict=True):
        memory = read_piece(piece, files, digest)
        for each in runs:
            copy_run(each, memory, flat)
        for name, tensor in _tensors(piece, memory, plan, plan.kept):
            is_its_own = piece.num_bytes > PIECE_BYTES  # that memory is nobody else's
            kept[name] = tensor if is_its_own else tensor.clone()
    return kept


def _tensors(piece: Piece, memory: Tensor, plan: LoadPlan, names: frozenset[str]) -> Iterable[tuple[str, Tensor]]:
    if names:
        for name, begin in zip(piece.names, piece.begins, strict=True):
            if name in names:
                yield name, tensor_in(memory, begin, plan.tensors[name])


def _feed(digest: "hashlib._Hash", parts: Iterable[bytes]) -> None:
    """Each part after its length, so that no two adapters feed the same bytes. What follows is the tensors' data, whose
    lengths the second part declares."""
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)


class _Nowhere:
    def update(self, data: memoryview, /) -> None:
        pass


def _refuse_nonfinite(plan: LoadPlan, files: Sequence[OpenFile], modules: PackedModules) -> None:
    """What is not finite as stored is not finite as computed with either, so all are looked at once, after the scaling;
    only to tell which tensor it is and whether it was so before, each is read again. All are finite where it is but
    their product that is too large.
    """
    dtype, pairs = modules.flat.dtype, plan.placement.pairs
    scales: dict[str, float | None] = {name: None for pair in pairs for name in pair.inputs}
    scales |= {pair.pair.inputs[1]: pair.pair.scale for pair in pairs if pair.is_copied}
    for piece in plan.pieces:
        memory = read_piece(piece, files, _Nowhere())
        for name, tensor in _tensors(piece, memory, plan, frozenset(scales)):
            check_finite(tensor, name, f"as stored ({str(tensor.dtype).removeprefix('torch.')})")
            scale = scales[name]
            ready = tensor.float() if scale is None else tensor.float() * scale
            check_finite(ready.to(dtype), name, _when_ready(dtype))
    for pair in pairs:
        for tensor in (modules[pair.module].lora_a, modules[pair.module].lora_b):
            check_finite(tensor, pair.inputs[0], _when_ready(dtype))


def _when_ready(dtype: torch.dtype) -> str:
    return f"after scaling and casting to {str(dtype).removeprefix('torch.')}"
