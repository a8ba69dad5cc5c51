"""Puts the parts of this package together for one server, and takes them down."""

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from adapters.checkpoint import CheckpointLimits, load_lora_model
from adapters.own_tokenizer import OwnTokenizers
from adapters.plan_cache import PlanCache
from adapters.version_store import VersionStore, base_key
from server.adapter_tokenizer import check_files
from server.async_engine import AsyncEngine, EngineInfo
from server.config import AdapterConfig, LoRALimits
from server.lifecycle.adapter_service import AdapterService
from server.lifecycle.adapters_file import AdaptersFile
from server.lifecycle.catalogue import Catalogue
from server.lifecycle.source_reader import ReadAdapter
from server.lifecycle.sources.source_options import split_options
from server.lifecycle.sources.source_template import SourceTemplate
from server.lifecycle.sources.sources import SourceLimits, Sources
from server.lifecycle.sources.upload_store import UploadStore
from server.lifecycle.state_folder import StateFolder
from server.lifecycle.watch_folder import WatchedFolder
from server.metrics import Metrics


@dataclass(frozen=True, slots=True)
class AdapterParts:
    service: AdapterService
    uploads: UploadStore
    state: StateFolder

    def reconcilers(self, config: AdapterConfig) -> list[WatchedFolder | AdaptersFile]:
        """What steers the service besides the routes; to be run as tasks once it has started."""
        steering: list[WatchedFolder | AdaptersFile] = []
        if config.adapter_dir is not None:
            steering.append(WatchedFolder(config.adapter_dir, self.service, memory=self.state.folder_memory))
        if config.adapters_file is not None:
            steering.append(AdaptersFile(config.adapters_file, self.service))
        return steering


async def open_adapters(
    stack: AsyncExitStack,
    engine: AsyncEngine,
    metrics: Metrics,
    config: AdapterConfig,
    lora: LoRALimits,
    *,
    base_names: Sequence[str],
    named: Sequence[Path] = (),
) -> AdapterParts:
    """Parts that the stack closes, the service not started yet. `named` are the folders of the command line, which may
    lie outside the allowed roots. Raises OSError, ValueError, AdapterError and
    CatalogueError when state or settings cannot be used.
    """
    state = StateFolder.at(config.state_dir)
    stack.callback(state.close)
    uploads = UploadStore(state.uploads, quota=config.upload_quota, max_bytes=lora.max_adapter_bytes)
    stack.callback(uploads.close)
    sources = Sources(
        roots=allowed_roots(config, named),
        allowed_urls=config.allowed_urls,
        staging=state.staging,
        limits=SourceLimits(max_bytes=lora.max_adapter_bytes),
        uploads=uploads,
    )
    stack.callback(sources.close)
    info = engine.info
    service = AdapterService(
        engine,
        _reader_for(info, lora),
        metrics,
        catalogue=Catalogue.open(config.database_url or state.catalogue_url),
        store=VersionStore(
            state.versions, base_key=base_key(info.base, info.dtype), fingerprint=info.weights.fingerprint
        ),
        sources=sources,
        base_names=base_names,
        limits=lora,
        row_bytes=info.memory.lora_pools // info.memory.lora_rows,
        lora_rows=info.memory.lora_rows,
        keep_versions=config.keep_versions,
        cold_timeout=config.adapter_timeout,
        template=None if config.source_template is None else SourceTemplate(config.source_template),
        uploads=uploads,
        server_id=state.server_id(),
    )
    stack.push_async_callback(service.close)
    engine.add_observer(service.device.observe_step)
    return AdapterParts(service, uploads, state)


def _reader_for(info: EngineInfo, lora: LoRALimits) -> ReadAdapter:
    """Reads adapters for the engine's base; what loads have in common is kept between them."""
    limits = CheckpointLimits(
        max_lora_rank=lora.max_lora_rank,
        max_adapter_bytes=lora.max_adapter_bytes,
        max_full_bytes=lora.max_full_bytes,
    )
    return partial(
        load_lora_model,
        base=info.base,
        limits=limits,
        dtype=info.dtype,
        weights=info.weights,
        plans=PlanCache(),
        tokenizers=OwnTokenizers(info.folder, check=check_files),
    )


def allowed_roots(config: AdapterConfig, named: Sequence[Path]) -> tuple[Path, ...]:
    """A folder is allowed by having been named, also one that is watched."""
    if not config.allowed_roots:
        return ()
    watched = () if config.adapter_dir is None else (config.adapter_dir,)
    places = (Path(split_options(str(path.absolute()))[0]) for path in named)
    return (*config.allowed_roots, *(path.absolute() for path in watched), *places)
