"""The flags of `loramux serve`: one per field of server.config, of the same name, with the field's own default.

Spellings are vLLM's where it has the flag. Each can also be set by environment: --max-num-seqs is LORAMUX_MAX_NUM_SEQS.
Knows what may be typed, nothing of what happens then.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from cyclopts import Group, Parameter, Token, validators

from server.config import (
    AdapterConfig,
    CacheConfig,
    EngineConfig,
    HTTPConfig,
    LoRALimits,
    ModelConfig,
    SchedulerConfig,
    ServerConfig,
)
from server.memory_size import format_memory, parse_memory

_Config = TypeVar("_Config")

_MODEL, _CACHE, _SCHEDULER, _LORA, _HTTP = ModelConfig(), CacheConfig(), SchedulerConfig(), LoRALimits(), HTTPConfig()
_ADAPTERS = AdapterConfig()

_MODEL_FLAGS = Group("Model", sort_key=1)
_ADAPTER_FLAGS = Group("Adapters", sort_key=2)
_LIFE_FLAGS = Group("Sources and state of adapters", sort_key=3)
_ENGINE_FLAGS = Group("Memory and batching", sort_key=4)
_HTTP_FLAGS = Group("HTTP", sort_key=5)


def _memory(_: Any, tokens: Sequence[Token]) -> int:
    return parse_memory(tokens[0].value)


def parse_lora_module(text: str) -> tuple[str, Path]:
    """`name=folder`, or vLLM's JSON `{"name": …, "path": …}`. Raises ValueError."""
    if text.lstrip().startswith("{"):
        name, path = _json_module(text)
    else:
        name, _, path = text.partition("=")
    if not name or not path:
        raise ValueError(f'--lora-modules takes name=folder or {{"name": ..., "path": ...}}, not {text!r}')
    return name, Path(path).expanduser()


def _json_module(text: str) -> tuple[str, str]:
    try:
        module = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--lora-modules: {text!r} is not JSON ({error.msg} at {error.pos})") from error
    unknown = set(module) - {"name", "path", "base_model_name"}
    if unknown:
        raise ValueError(f"--lora-modules: unknown {', '.join(sorted(unknown))}; known are name, path, base_model_name")
    return str(module.get("name", "")), str(module.get("path", ""))


def _check_modules(_: Any, modules: tuple[str, ...]) -> None:
    names = [parse_lora_module(text)[0] for text in modules]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--lora-modules names {name!r} twice; give each adapter a name of its own")


Count = Annotated[int, Parameter(validator=validators.Number(gte=1))]
Memory = Annotated[
    int, Parameter(converter=_memory, validator=validators.Number(gte=0), show_default=format_memory, n_tokens=1)
]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What was typed. `config` is what it means."""

    revision: Annotated[str | None, Parameter(group=_MODEL_FLAGS, help="Branch, tag or commit of a hub model.")] = (
        _MODEL.revision
    )
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Parameter(group=_MODEL_FLAGS, help="Weights and computation; auto is the checkpoint's own."),
    ] = _MODEL.dtype  # type: ignore[assignment]
    device: Annotated[
        str, Parameter(group=_MODEL_FLAGS, help="auto, cpu, cuda or cuda:N; auto is cuda when there is one.")
    ] = _MODEL.device
    load_format: Annotated[
        Literal["auto", "safetensors", "dummy"],
        Parameter(group=_MODEL_FLAGS, help="dummy: random weights from the config alone."),
    ] = _MODEL.load_format  # type: ignore[assignment]
    max_model_len: Annotated[
        Count | None, Parameter(group=_MODEL_FLAGS, help="Tokens of prompt and output; the model's own limit if unset.")
    ] = _MODEL.max_model_len
    skip_probe: Annotated[
        bool,
        Parameter(group=_MODEL_FLAGS, negative="", help="Serve without comparing with the model's own forward pass."),
    ] = _MODEL.skip_probe
    enforce_eager: Annotated[
        bool,
        Parameter(group=_MODEL_FLAGS, negative="", help="No CUDA graphs: a faster start, slower decode steps."),
    ] = _MODEL.enforce_eager
    seed: Annotated[int, Parameter(group=_MODEL_FLAGS, help="Of dummy weights.")] = _MODEL.seed
    cpu_threads: Annotated[
        Count | None,
        Parameter(group=_MODEL_FLAGS, help="Of the forward pass on CPU; OMP_NUM_THREADS or all cores."),
    ] = _MODEL.cpu_threads
    served_model_name: Annotated[
        tuple[str, ...],
        Parameter(
            group=_MODEL_FLAGS,
            consume_multiple=True,
            negative="",
            show_default=False,
            help="Names of the base model in requests; the first is the one in replies.",
        ),
    ] = ()

    lora_modules: Annotated[
        tuple[str, ...],
        Parameter(
            alias="--lora-paths",
            group=_ADAPTER_FLAGS,
            consume_multiple=True,
            negative="",
            show_default=False,
            validator=_check_modules,
            help="Adapters loaded at start: name=folder ..., or vLLM's JSON form.",
        ),
    ] = ()
    samples: Annotated[
        bool | None,
        Parameter(
            group=_ADAPTER_FLAGS,
            show_default=False,
            help="Serve the shipped sample adapters too; on when no MODEL is named.",
        ),
    ] = None
    max_lora_rank: Annotated[Count, Parameter(group=_ADAPTER_FLAGS, help="Adapters of a higher rank are refused.")] = (
        _LORA.max_lora_rank
    )
    lora_memory: Annotated[
        Memory, Parameter(group=_ADAPTER_FLAGS, help="Device memory for adapters: 512MiB, 2GiB, GiB, or bytes.")
    ] = _LORA.lora_memory
    lora_extras_memory: Annotated[
        Memory, Parameter(group=_ADAPTER_FLAGS, help="The same of a GPU, for what adapters have besides pairs.")
    ] = _LORA.lora_extras_memory
    max_loras: Annotated[
        Count | None,
        Parameter(group=_ADAPTER_FLAGS, help="Distinct adapters per step; what the memory holds if unset."),
    ] = _LORA.max_loras
    max_cpu_loras: Annotated[
        Count | None, Parameter(group=_ADAPTER_FLAGS, help="Adapters in host memory; what it holds if unset.")
    ] = _LORA.max_cpu_loras
    cpu_lora_memory: Annotated[Memory, Parameter(group=_ADAPTER_FLAGS, help="Host memory for adapters.")] = (
        _LORA.cpu_lora_memory
    )
    max_adapter_bytes: Annotated[Memory, Parameter(group=_ADAPTER_FLAGS, help="One adapter's files.")] = (
        _LORA.max_adapter_bytes
    )
    max_full_bytes: Annotated[Memory, Parameter(group=_ADAPTER_FLAGS, help="One adapter's own embedding and head.")] = (
        _LORA.max_full_bytes
    )
    enable_lora: Annotated[
        bool, Parameter(group=_ADAPTER_FLAGS, negative="", show_default=False, help="Accepted and ignored: always on.")
    ] = True

    state_dir: Annotated[
        Path | None, Parameter(group=_LIFE_FLAGS, help="Keeps adapters and names over a restart; forgotten if unset.")
    ] = _ADAPTERS.state_dir
    database_url: Annotated[
        str | None,
        Parameter(
            group=_LIFE_FLAGS,
            help="Database of names, for replicas to share: postgresql+psycopg://...; SQLite in the state folder.",
        ),
    ] = _ADAPTERS.database_url
    allowed_roots: Annotated[
        tuple[Path, ...],
        Parameter(
            group=_LIFE_FLAGS,
            consume_multiple=True,
            negative="",
            show_default=False,
            help="Folders that adapters may be loaded from; any the server can read if unset.",
        ),
    ] = _ADAPTERS.allowed_roots
    allowed_urls: Annotated[
        tuple[str, ...],
        Parameter(
            group=_LIFE_FLAGS,
            consume_multiple=True,
            negative="",
            help="Prefixes that adapters may be fetched from: hf:// s3:// gs:// az:// https://.",
        ),
    ] = _ADAPTERS.allowed_urls
    upload_quota: Annotated[Memory, Parameter(group=_LIFE_FLAGS, help="Disk for uploaded adapters.")] = (
        _ADAPTERS.upload_quota
    )
    keep_versions: Annotated[
        int,
        Parameter(
            group=_LIFE_FLAGS, validator=validators.Number(gte=0, lte=100), help="Replaced ones kept, to go back."
        ),
    ] = _ADAPTERS.keep_versions
    adapter_timeout: Annotated[
        float,
        Parameter(group=_LIFE_FLAGS, validator=validators.Number(gt=0), help="Seconds to wait for a cold adapter."),
    ] = _ADAPTERS.adapter_timeout
    source_template: Annotated[
        str | None,
        Parameter(
            group=_LIFE_FLAGS, help="Where a name that nobody registered is looked for: hf://org/{name}, /srv/{name}."
        ),
    ] = _ADAPTERS.source_template
    adapter_dir: Annotated[
        Path | None,
        Parameter(group=_LIFE_FLAGS, help="Folder whose subfolders are adapters, for as long as they are there."),
    ] = _ADAPTERS.adapter_dir
    adapters_file: Annotated[
        Path | None, Parameter(group=_LIFE_FLAGS, help="YAML file that says which adapters and aliases to serve.")
    ] = _ADAPTERS.adapters_file

    kv_cache_memory: Annotated[
        Memory, Parameter(group=_ENGINE_FLAGS, help="The paged KV cache: 512MiB, 2GiB, GiB, or bytes.")
    ] = _CACHE.kv_cache_memory
    block_size: Annotated[Count, Parameter(group=_ENGINE_FLAGS, help="Tokens per KV block.")] = _CACHE.block_size
    enable_prefix_caching: Annotated[
        bool, Parameter(group=_ENGINE_FLAGS, help="Share the KV blocks of equal prompt beginnings.")
    ] = _CACHE.enable_prefix_caching
    max_num_seqs: Annotated[Count, Parameter(group=_ENGINE_FLAGS, help="Requests per step.")] = _SCHEDULER.max_num_seqs
    max_num_batched_tokens: Annotated[Count, Parameter(group=_ENGINE_FLAGS, help="Tokens per step.")] = (
        _SCHEDULER.max_num_batched_tokens
    )
    max_waiting: Annotated[
        Count, Parameter(group=_ENGINE_FLAGS, help="Requests in the queue before new ones are answered 429.")
    ] = _SCHEDULER.max_waiting
    max_bypassed_steps: Annotated[
        Count, Parameter(group=_ENGINE_FLAGS, help="Steps a request may be overtaken for want of adapter memory.")
    ] = _SCHEDULER.max_bypassed_steps

    host: Annotated[
        str, Parameter(group=_HTTP_FLAGS, help="Address to bind; other than loopback asks for --api-key.")
    ] = _HTTP.host
    port: Annotated[
        int, Parameter(group=_HTTP_FLAGS, validator=validators.Number(gte=0, lte=65535), help="0 takes a free one.")
    ] = _HTTP.port
    api_key: Annotated[
        str | None, Parameter(group=_HTTP_FLAGS, help="Key that clients send; better set as LORAMUX_API_KEY.")
    ] = _HTTP.api_key
    admin_api_key: Annotated[
        str | None, Parameter(group=_HTTP_FLAGS, help="Key that may load and unload adapters.")
    ] = _HTTP.admin_api_key
    shutdown_timeout: Annotated[
        float, Parameter(group=_HTTP_FLAGS, validator=validators.Number(gte=0), help="Seconds to finish after SIGTERM.")
    ] = _HTTP.shutdown_timeout
    max_body_bytes: Annotated[Memory, Parameter(group=_HTTP_FLAGS, help="One request's body.")] = _HTTP.max_body_bytes
    max_header_bytes: Annotated[Memory, Parameter(group=_HTTP_FLAGS, help="One request's line and headers.")] = (
        _HTTP.max_header_bytes
    )
    max_n: Annotated[Count, Parameter(group=_HTTP_FLAGS, help="Choices per request.")] = _HTTP.max_n
    metrics_adapters: Annotated[
        int,
        Parameter(
            group=_HTTP_FLAGS,
            validator=validators.Number(gte=0),
            help='Adapters with metric series of their own; the rest share "other".',
        ),
    ] = _HTTP.metrics_adapters

    def config(self, model: str | None, samples: Sequence[tuple[str, Path]] = ()) -> ServerConfig:
        """The server's settings. Named adapters win over samples of the same name."""
        wants_samples = model is None if self.samples is None else self.samples
        shipped = dict(samples if wants_samples else ())
        named = dict(parse_lora_module(text) for text in self.lora_modules)
        return ServerConfig(
            engine=EngineConfig(
                model=self._part(ModelConfig, model=model),
                cache=self._part(CacheConfig),
                scheduler=self._part(SchedulerConfig),
                lora=self._part(LoRALimits),
            ),
            adapters=self._part(AdapterConfig),
            http=self._part(HTTPConfig),
            served_model_names=self.served_model_name,
            lora_modules=tuple((shipped | named).items()),
            samples=frozenset(shipped.keys() - named.keys()),
        )

    def _part(self, config: type[_Config], **given: Any) -> _Config:
        """Fill one of the config's dataclasses from the options of the same names."""
        names = [each.name for each in fields(config) if each.name not in given]  # type: ignore[arg-type]
        return config(**given, **{name: getattr(self, name) for name in names})
