"""Published faults of other engines, put back into ours: each takes a MonkeyPatch and breaks one promise for its time.

They patch classes, so that what runs already is broken too. Knows nothing of how a fault is caught.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from adapters import placement, run_extras, run_plan
from adapters.adapter_ref import AdapterUse, AdapterVersion, Lease
from adapters.errors import AdapterRefused
from adapters.load_plan import PlacedPair
from adapters.lora_config import LoRAConfig
from adapters.lora_model import LoRAModel
from adapters.module_names import BaseModules, Resolution
from adapters.packed_modules import PackedModules
from adapters.registry import AdapterRegistry
from adapters.residency import AdapterResidency
from adapters.row_range_pool import RowRangePool
from adapters.tensor_pieces import Piece
from server.engine import engine as engine_module
from server.engine.adapter_room import AdapterRoom, Room
from server.engine.engine import Engine
from server.engine.prefix_cache import BlockContent, PrefixCache
from server.engine.request import Request
from server.errors import ModelNotFound
from server.lifecycle.model_names import ModelNames


def slot_evicted_while_in_use(patch: pytest.MonkeyPatch) -> None:
    """vllm#47724: the least recently used slot goes, whether its rows run in this step or not, and nobody looks."""
    pin = RowRangePool.pin

    def forgetful(self: RowRangePool, version: AdapterVersion, lora_rank: int, num_extra_bytes: int = 0) -> bool:
        granted = pin(self, version, lora_rank, num_extra_bytes)
        self._pinned.discard(version)
        return granted

    def anywhere(self: AdapterResidency, version: AdapterVersion) -> int:
        ranges = self.pool._ranges
        return ranges[version].start if version in ranges else 0  # the slot it had, whoever is there now

    patch.setattr(RowRangePool, "pin", forgetful)
    patch.setattr(AdapterResidency, "_start_of", anywhere)


def memoised_row_ranges(patch: pytest.MonkeyPatch) -> None:
    """vllm#47725: a batch's mapping onto rows is kept for as long as the same adapters ask, whoever moved since."""
    row_ranges = AdapterResidency.row_ranges
    kept: dict[tuple[int, tuple[AdapterUse, ...]], Any] = {}

    def memoised(self: AdapterResidency, uses: tuple[AdapterUse, ...]) -> Any:
        return kept.setdefault((id(self), uses), row_ranges(self, uses))

    patch.setattr(AdapterResidency, "row_ranges", memoised)


def one_adapter_for_the_batch(patch: pytest.MonkeyPatch) -> None:
    """ms-swift#10134: requests of equal parameters are merged and the first one's adapter serves them all."""
    build = engine_module.build_forward_batch

    def merged(rows: Any, block_size: int, row_ranges: Any, *rest: Any) -> Any:
        first = next((row.request.adapters for row in rows if row.request.adapters), ())
        return build(rows, block_size, lambda uses: row_ranges(first) if uses else (), *rest)

    patch.setattr(engine_module, "build_forward_batch", merged)


def prefix_cache_by_name(patch: pytest.MonkeyPatch, names: Mapping[AdapterVersion, str]) -> None:
    """vllm#42125: the prefix cache knows an adapter by its name, whatever bytes it has by now."""
    root = PrefixCache.root

    def by_name(self: PrefixCache, adapters: tuple[AdapterUse, ...]) -> BlockContent:
        return root(self, tuple(AdapterUse(AdapterVersion(names[use.version]), use.weight) for use in adapters))

    patch.setattr(PrefixCache, "root", by_name)


def prefix_cache_without_adapters(patch: pytest.MonkeyPatch) -> None:
    """llama.cpp#26207: a cached prompt is served again whichever adapter, at whatever scale, computed it."""
    root = PrefixCache.root
    patch.setattr(PrefixCache, "root", lambda self, adapters: root(self, ()))


def pools_written_every_step(patch: pytest.MonkeyPatch) -> None:
    """vllm#33791: the flag that asks for a reload sticks to the request, so that every step loads it again."""

    def everything(self: RowRangePool) -> Any:
        self._pending.clear()
        return list(self._ranges.items())

    patch.setattr(RowRangePool, "take_pending", everything)


def unload_ignores_leases(patch: pytest.MonkeyPatch) -> None:
    """vllm#13698: weights are freed while requests still run on them."""
    take_away = AdapterRegistry._take_away

    def at_once(self: AdapterRegistry, old: Any, unless: Any = None) -> None:
        take_away(self, old, unless)
        if old.ref.version in self._versions and not self._versions[old.ref.version].names:
            self._on_unused(old.ref.version)

    patch.setattr(AdapterRegistry, "_take_away", at_once)
    patch.setattr(Engine, "unload_adapter", lambda self, version: self.adapters.unload(version))


def leases_counted_at_admission(patch: pytest.MonkeyPatch) -> None:
    """SGLang's source before its one atomic acquire: look a name up now, count the use when the engine admits."""
    acquire, add_request = AdapterRegistry.acquire, Engine.add_request
    uncounted: list[tuple[AdapterRegistry, Lease]] = []

    def lookup(self: AdapterRegistry, name: str) -> Lease:
        counted = acquire(self, name)
        self._versions[counted.ref.version].leases.discard(counted)
        lease = Lease(counted.ref, lambda each: _give_back_if_counted(self, each))
        uncounted.append((self, lease))
        return lease

    def admit(self: Engine, request: Any) -> None:
        while uncounted:
            registry, lease = uncounted.pop()
            if lease.ref.version in registry._versions:
                registry._versions[lease.ref.version].leases.add(lease)
        add_request(self, request)

    patch.setattr(AdapterRegistry, "acquire", lookup)
    patch.setattr(Engine, "add_request", admit)


def _give_back_if_counted(registry: AdapterRegistry, lease: Lease) -> None:
    if lease in registry.leases(lease.ref.version):
        registry._give_back(lease)


def replacement_mutates_what_runs(patch: pytest.MonkeyPatch) -> None:
    """vllm#31326: `load_inplace` puts the new weights where the old ones are, under the requests that run on them."""
    load = AdapterResidency.load

    def in_place(self: AdapterResidency, model: LoRAModel) -> None:
        for version in self.active_versions:
            old = self.host.get(version)
            if old is not None and old.lora_rank == model.lora_rank:
                start = self.pool.range_of(version).start
                self.layers.write(start, model)
                # The slot still has the name it had.
                self.layers._written[start] = replace(self.layers._written[start], model=old)
        load(self, model)

    patch.setattr(AdapterResidency, "load", in_place)


def unmatched_modules_are_dropped(patch: pytest.MonkeyPatch) -> None:
    """vllm#34186: a tensor whose module the base does not have is left out, and the load is a success."""
    real, read = placement.locate, run_plan.read_piece

    def lenient(names: Sequence[str], base: BaseModules) -> Resolution:
        try:
            return real(names, base)
        except AdapterRefused:  # some modules that fit, whose weights become zero below
            return Resolution({name: name.removeprefix("nowhere.") for name in names}, "lenient")

    def emptied(piece: Piece, files: Any, digest: Any) -> Tensor:
        memory = read(piece, files, digest)
        return memory.zero_() if any("nowhere" in name for name in piece.names) else memory

    patch.setattr(placement, "locate", lenient)
    patch.setattr(run_plan, "read_piece", emptied)


def undersized_tensors_are_padded(patch: pytest.MonkeyPatch) -> None:
    """vllm-omni#6476: a tensor smaller than its module is filled up with zeros."""
    _take_any_shape(patch)


def _take_any_shape(patch: pytest.MonkeyPatch) -> None:
    """What is too small is filled up with zeros, what is too large is cut."""

    def fitted(placed: PlacedPair, sources: Any, made: Any, modules: PackedModules) -> None:
        lora_a, lora_b = (sources.floats(name) for name in placed.pair.inputs)
        target = modules[placed.module]
        for stored, to in ((lora_a, target.lora_a), (lora_b.T * placed.pair.scale, target.lora_b)):
            rows, columns = (min(sizes) for sizes in zip(stored.shape, to.shape, strict=True))
            to[:rows, :columns] = stored[:rows, :columns]

    patch.setattr(placement, "_check_base", lambda *_: None)
    patch.setattr(placement, "_check_shapes", lambda lora_a, lora_b, module, shape: int(lora_a.shape[0]))
    patch.setattr(PlacedPair, "is_copied", False)
    patch.setattr(run_extras, "_fold_pair", fitted)


def rslora_is_ignored(patch: pytest.MonkeyPatch) -> None:
    """sglang#40835: alpha over r where the file says alpha over the root of r."""

    def plain(self: LoRAConfig, module: str) -> float:
        return self.lora_alpha / self.rank_of(module)

    patch.setattr(LoRAConfig, "scale_of", plain)


def unload_frees_nothing(patch: pytest.MonkeyPatch) -> None:
    """vllm#54839: the name is gone and the slot is free, the weights stay in host memory."""
    patch.setattr(AdapterResidency, "unload", lambda self, version: self._deactivate(version))


def nobody_hears_of_the_unused(patch: pytest.MonkeyPatch) -> None:
    """vllm#42633: unload and load a name again, and the cache has two copies, since the first was never let go."""

    def forget(self: AdapterRegistry, version: AdapterVersion) -> None:
        if self._versions[version].is_unused:
            del self._versions[version]

    patch.setattr(AdapterRegistry, "_forget_if_unused", forget)


def a_place_is_read_once(patch: pytest.MonkeyPatch) -> None:
    """vllm#48352: what was read from a path is kept by the path, whatever lies there by now."""
    read, kept = run_plan.read_piece, dict[tuple[str, ...], Tensor]()

    def once(piece: Piece, files: Any, digest: Any) -> Tensor:
        if piece.names not in kept:
            kept[piece.names] = read(piece, files, hashlib.sha256()).clone()
        memory = kept[piece.names]
        for begin, end in piece.hashed:
            digest.update(memory.numpy().data[begin:end])
        return memory

    patch.setattr(run_plan, "read_piece", once)


def base_row_takes_a_slot(patch: pytest.MonkeyPatch) -> None:
    """sglang#23141: "no adapter" counts as one more adapter of the batch."""
    ask = AdapterRoom._ask

    def counted(self: AdapterRoom, adapters: tuple[AdapterUse, ...]) -> Room:
        if adapters:
            return ask(self, adapters)
        pool = self._residency.pool  # type: ignore[attr-defined]
        has_room = pool.room.max_loras is None or len(pool._pinned) < pool.room.max_loras
        return Room.GRANTED if has_room else Room.NOT_NOW

    def admit(self: AdapterRoom, request: Request) -> Room:
        return counted(self, request.adapters)

    patch.setattr(AdapterRoom, "_ask", counted)
    patch.setattr(AdapterRoom, "admit", admit)


def nobody_drains(patch: pytest.MonkeyPatch) -> None:
    """sglang#15129: requests for the adapter that is there overtake for as long as there are any."""
    patch.setattr(AdapterRoom, "_pass_over", lambda self, request_id: None)


def unknown_names_are_the_base(patch: pytest.MonkeyPatch) -> None:
    """TGI#2505: an adapter that does not exist is answered by the base model."""
    resolve = ModelNames.resolve

    def lenient(self: ModelNames, model: str, key: str | None = None) -> Any:
        try:
            return resolve(self, model, key)
        except ModelNotFound:
            return None

    patch.setattr(ModelNames, "resolve", lenient)


def what_follows_a_colon_is_an_adapter(patch: pytest.MonkeyPatch) -> None:
    """sglang#12745: `base:latest` is split at the colon and the rest looked up as an adapter."""
    resolve = ModelNames.resolve
    patch.setattr(ModelNames, "resolve", lambda self, model, key=None: resolve(self, model.rpartition(":")[2], key))


def ranks_are_not_limited(patch: pytest.MonkeyPatch) -> None:
    """gpustack#5438: an adapter over the rank limit goes in, and the engine meets it later."""
    patch.setattr(placement, "_check_rank", lambda *_: None)


def bases_are_not_compared(patch: pytest.MonkeyPatch) -> None:
    """vllm#11727: an adapter of another base is accepted, and the step that uses it crashes."""
    _take_any_shape(patch)
