"""Every setting of the server, frozen, made once and passed down in parts. Defaults live here and nowhere else."""

from dataclasses import dataclass, field
from pathlib import Path

GIB = 1024**3
MIB = 1024**2


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which base model, and how it is loaded. `model` None is the embedded default."""

    model: str | None = None  # local Hugging Face folder or hub id
    revision: str | None = None
    dtype: str = "auto"  # auto = the checkpoint's; float32, bfloat16
    device: str = "auto"  # auto = cuda when there is one, else cpu
    load_format: str = "auto"  # auto = the checkpoint's weights; dummy = random weights from the config
    max_model_len: int | None = None  # tokens of prompt and output; None = the model's own limit
    skip_probe: bool = False
    enforce_eager: bool = False  # run decode steps on a GPU without CUDA graphs
    cpu_threads: int | None = None  # of the forward pass on CPU; None = OMP_NUM_THREADS, else chosen by cpu_model.py
    seed: int = 0  # of dummy weights


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """The paged KV cache."""

    block_size: int = 16  # tokens per block
    kv_cache_memory: int = 1 * GIB  # bytes, K and V of all layers
    enable_prefix_caching: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """How much one step may hold and how many may wait."""

    max_num_seqs: int = 64  # rows per step
    max_num_batched_tokens: int = 512  # tokens per step
    max_waiting: int = 512  # requests in the queue before new ones are answered 429
    max_bypassed_steps: int = 64  # steps a request may be overtaken for want of adapter room before it blocks the rest


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRALimits:
    """What adapters may take."""

    max_lora_rank: int = 256
    lora_memory: int = 1 * GIB  # bytes of device pools
    lora_extras_memory: int = 1 * GIB  # bytes of a GPU beside the pools, for what adapters have besides pairs
    max_loras: int | None = None  # distinct adapters per step; None = what the pools hold
    max_cpu_loras: int | None = None  # adapters in host memory; None = as many as cpu_lora_memory holds
    cpu_lora_memory: int = 4 * GIB  # bytes of adapters in host memory
    max_adapter_bytes: int = 2 * GIB  # bytes of one adapter's files
    max_full_bytes: int = 512 * MIB  # bytes of embedding and head that one adapter brings whole


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What the engine needs to run; no names, no wire."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    lora: LoRALimits = field(default_factory=LoRALimits)


@dataclass(frozen=True, slots=True, kw_only=True)
class HTTPConfig:
    """The front door. Keys None = open, and then only loopback hosts are allowed."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    admin_api_key: str | None = field(default=None, repr=False)
    shutdown_timeout: float = 30.0  # seconds for running requests after SIGTERM
    max_body_bytes: int = 1 * MIB
    max_header_bytes: int = 32 * 1024
    max_n: int = 8
    metrics_adapters: int = 50  # adapters with metric series of their own; the rest share "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """Where adapters may come from, and what the server keeps of them."""

    state_dir: Path | None = None  # None = a temporary folder: what was loaded over HTTP is forgotten at exit
    database_url: str | None = field(default=None, repr=False)  # None = SQLite in the state folder
    allowed_roots: tuple[Path, ...] = ()  # folders adapters may lie in; () = any the server can read
    allowed_urls: tuple[str, ...] = ("hf://",)  # prefixes of the remote sources
    upload_quota: int = 10 * GIB  # bytes of all uploads
    keep_versions: int = 2  # replaced versions a name keeps on disk
    adapter_timeout: float = 30.0  # seconds a request waits for an adapter that is not in memory
    source_template: str | None = None  # where a name that nobody registered is looked for: hf://org/{name}
    adapter_dir: Path | None = None  # each subfolder is an adapter, for as long as it is there
    adapters_file: Path | None = None  # YAML that says what is to be served


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    engine: EngineConfig = field(default_factory=EngineConfig)
    adapters: AdapterConfig = field(default_factory=AdapterConfig)
    http: HTTPConfig = field(default_factory=HTTPConfig)
    served_model_names: tuple[str, ...] = ()  # () = the model's own name; the first is the one in replies
    lora_modules: tuple[tuple[str, Path], ...] = ()  # (name, folder) loaded at start
    samples: frozenset[str] = frozenset()  # names of those that nobody asked for: they yield to what has the name
