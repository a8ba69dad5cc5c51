"""Everything in a base model that adapters change beside the low-rank deltas of linears, and where resident adapters'
numbers for it stand.

Norms, embedding, head and routers are swapped by class, as linears are (class_swap.py); linears ask their group, and
experts what was bound to them (lora_experts.py). An adapter is known by the first of its pool rows. Knows nothing of
requests, versions or eviction.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapters.applied_extras import AppliedExtras
from adapters.class_swap import own_forward, swap
from adapters.expert_sites import ExpertsSite, LoRARouter, RouterSite
from adapters.extras_batch import ExtrasBatch, IntArray
from adapters.group_extras import GroupExtras
from adapters.lora_batch import LoRABatch
from adapters.lora_embedding import EmbeddingSite, LoRAEmbedding
from adapters.lora_experts import FusedExperts, bound_experts
from adapters.lora_head import HeadSite, LoRAHead
from adapters.lora_norm import LoRANorm, NormSite
from adapters.lora_step import Step
from adapters.module_names import BaseModules
from adapters.ops import AffineOps, AffineTable
from adapters.staged_extras import StagedExtras
from adapters.step_features import NO_FEATURES, StepFeature


class ExtraLayers:
    """`linears` are those that have pools, in any order. Call `bind_group` for each of their groups, then `swap`."""

    def __init__(
        self, model: nn.Module, base: BaseModules, step: Step, linears: Sequence[str], num_rows: int, ops: AffineOps
    ) -> None:
        self._model = model
        self._base = base
        self._step = step
        self._ops = ops
        self._device = next(model.parameters()).device
        self._sites = {name: site for site, name in enumerate([*linears, *base.norms])}
        self._table = AffineTable(len(self._sites), num_rows, self._device)
        self._groups: dict[tuple[str, ...], GroupExtras] = {}
        self._norms = {name: self._norm_site(name) for name in base.norms}
        self._embedding = self._embedding_site()
        self._head = self._head_site()
        self._experts = {name: (_fused(model, name), ExpertsSite(step)) for name in base.experts}
        self._routers = {
            name: RouterSite(step, router, own_forward(router))
            for name, router in ((name, model.get_submodule(name)) for name in base.routers)
        }
        self._applied: dict[int, AppliedExtras] = {}  # by first pool row

    def bind_group(
        self, names: Sequence[str], widths: Sequence[int], forwards: Sequence[Callable[[Tensor], Tensor]]
    ) -> GroupExtras:
        """What linears that read one input ask for; `forwards` are theirs without adapters."""
        bound = self._ops.bind_affine(self._table, [self._sites[name] for name in names], widths)
        group = self._groups[tuple(names)] = GroupExtras(bound, forwards)
        return group

    def swap(self) -> None:
        """Let norms, embedding, head, experts and routers ask, too."""
        for name, site in self._norms.items():
            swap(self._model.get_submodule(name), LoRANorm, site)
        if self._embedding is not None and self._base.embedding is not None:
            swap(self._model.get_submodule(self._base.embedding.name), LoRAEmbedding, self._embedding)
        if self._head is not None and self._base.head is not None:
            swap(self._model.get_submodule(self._base.head.name), LoRAHead, self._head)
        for fused, experts in self._experts.values():
            fused.site = experts
        for name, router in self._routers.items():
            swap(self._model.get_submodule(name), LoRARouter, router)

    def write(self, start: int, applied: AppliedExtras) -> None:
        """Apply an adapter's extras where its pool rows begin at `start`, over whatever began there."""
        self.clear(start)
        applied = applied.to_device(self._device)
        self._table.write(start, {self._sites[name]: vectors for name, vectors in applied.affines.items()})
        for names, group in self._groups.items():
            deltas = [applied.input_deltas.get(name) for name in names]
            if any(name in applied.affines or name in applied.input_deltas for name in names):
                group.write(start, deltas)
        for name, norm in self._norms.items():
            if name in applied.affines:
                norm.touched.add(start)
            if name in applied.exact_norms:
                norm.exact[start] = applied.exact_norms[name]
        if self._embedding is not None and applied.embedding is not None:
            self._embedding.table[start] = applied.embedding
        if self._head is not None and applied.head is not None:
            self._head.table[start] = applied.head
        for name, pairs in applied.experts.items():
            self._experts[name][1].table[start] = pairs
        for name, pair in applied.routers.items():
            self._routers[name].table[start] = pair
        self._applied[start] = applied

    def clear(self, start: int) -> None:
        """Forget the adapter whose rows begin at `start`, where there is one with extras."""
        if self._applied.pop(start, None) is None:
            return
        for group in self._groups.values():
            group.clear(start)
        for norm in self._norms.values():
            norm.clear(start)
        for hosted in self._hosted():
            hosted.pop(start, None)
        self._table.clear(start)

    def features_at(self, start: int) -> StepFeature:
        found = self._applied.get(start)
        return NO_FEATURES if found is None else found.features

    def columns_at(self, start: int) -> int | None:
        """Of the logits, where the adapter has more of them than the base."""
        found = self._applied.get(start)
        return None if found is None else found.num_columns

    def batch_of(self, lora: LoRABatch | None, input_ids: IntArray, head_rows: IntArray) -> ExtrasBatch | None:
        """The extras of a step with these ids [num_tokens], whose head sees the tokens `head_rows`; None when its
        adapters have none."""
        if lora is None or not self._applied:
            return None
        embedding = self._base.embedding
        foreign = [] if embedding is None else (input_ids >= embedding.num_rows).nonzero()[0].tolist()
        foreign_ids = tuple((token, int(input_ids[token])) for token in foreign)
        return ExtrasBatch.build(lora, head_rows, self.features_at, self.columns_at, foreign_ids)

    def stage(self, extras: ExtrasBatch, lora: LoRABatch) -> StagedExtras:
        """A step's extras as the modules read them; both are of one step."""
        is_affine = bool(extras.features & StepFeature.AFFINE)
        affine: Any = self._ops.stage_affine(lora, extras.affine_tokens) if is_affine else None
        return StagedExtras(extras, lora.num_tokens, affine)

    def check_integrity(self) -> None:
        """What stands in groups, norms, embedding, head and the table of vectors is of adapters that are here."""
        self._table.check_integrity()
        held = {
            "affine vectors": {start for _, start in self._table.vectors},
            "linears": {start for group in self._groups.values() for start in group.touched},
            "norms": {start for norm in self._norms.values() for start in (*norm.touched, *norm.exact)},
            "embedding, head, experts and routers": {start for table in self._hosted() for start in table},
        }
        for where, starts in held.items():
            assert starts <= self._applied.keys(), f"{where} knows rows {starts - self._applied.keys()} of nobody"

    @property
    def starts(self) -> frozenset[int]:
        """The first rows of adapters with extras."""
        return frozenset(self._applied)

    def _hosted(self) -> list[dict[int, Any]]:
        """The tables of what is computed in plain torch."""
        tables: list[dict[int, Any]] = [site.table for _, site in self._experts.values()]
        tables += [site.table for site in self._routers.values()]
        tables += [self._embedding.table] if self._embedding is not None else []
        return [*tables, *([self._head.table] if self._head is not None else [])]

    def _norm_site(self, name: str) -> NormSite:
        norm, shape = self._model.get_submodule(name), self._base.norms[name]
        if norm.get_parameter("weight").shape != shape.shape:
            raise ValueError(f"{name} has a weight of {norm.get_parameter('weight').shape} but is {shape} in the base")
        bound = self._ops.bind_affine(self._table, [self._sites[name]], [torch.Size(shape.shape).numel()])
        return NormSite(self._step, norm, own_forward(norm), shape.shape, bound)

    def _embedding_site(self) -> EmbeddingSite | None:
        shape = self._base.embedding
        if shape is None:
            return None
        return EmbeddingSite(self._step, own_forward(self._model.get_submodule(shape.name)), shape)

    def _head_site(self) -> HeadSite | None:
        shape = self._base.head
        if shape is None:
            return None
        head = self._model.get_submodule(shape.name)
        return HeadSite(self._step, own_forward(head), shape, head._parameters.get("bias"))


def _fused(model: nn.Module, name: str) -> FusedExperts:
    found = bound_experts(model.get_submodule(name))
    if found is None:
        raise ValueError(f"{name} has experts that were not bound: adapters would not reach them")
    return found
