"""The frozen base model: a stock transformers causal LM, loaded once, with our attention bound to it.

Loading ends with a numeric probe: the packed, chunked, paged way must give the logits of the model's own forward,
or the model is refused by name. Knows nothing of requests and adapters; the weights are never written.
"""

import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, PreTrainedConfig, PreTrainedModel

from adapters.base_weights import BaseWeights
from adapters.module_names import BaseModules
from adapters.shared_inputs import SharedInputs
from server.config import ModelConfig
from server.engine import experts
from server.engine.attention import select_backend
from server.engine.attention.interface import ATTENTION_NAME, KVLayer, LayerBinding, StepContext, attention, bind
from server.engine.kv_cache import KVShape
from server.engine.live_weights import LiveWeights, fingerprint
from server.engine.model_outline import auto_class, from_config, outline_of

_DISCOVERY_NAME = "loramux-discovery"

AttentionInterface.register(ATTENTION_NAME, attention)


class ModelRefused(Exception):
    """The base model cannot be served exactly; the message names it, says why, and the way out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModel:
    """A loaded base model and what the engine must know of it."""

    name: str
    model: PreTrainedModel
    config: PreTrainedConfig
    modules: BaseModules
    dtype: torch.dtype
    device: torch.device
    max_model_len: int  # tokens
    vocab_size: int
    eos_token_ids: frozenset[int]
    kv_shapes: tuple[KVShape, ...]  # one per attention layer
    step_context: Callable[[], AbstractContextManager[None]]  # to be inside for the length of a forward pass
    context: StepContext
    bindings: tuple[LayerBinding, ...]  # in the order of kv_shapes
    keeps_logits: bool  # forward takes logits_to_keep
    weights: BaseWeights
    folder: Path

    @property
    def weight_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def attach(self, layers: Sequence[KVLayer]) -> None:
        """Give every attention layer its part of the KV cache."""
        for binding, layer in zip(self.bindings, layers, strict=True):
            binding.kv = layer

    def forward(self, input_ids: Tensor, positions: Tensor, logits_indices: Tensor) -> Tensor:
        """Logits [num_logits, vocab] at `logits_indices` of the packed tokens [num_tokens]; run inside a step."""
        keep: dict[str, Any] = {"logits_to_keep": logits_indices} if self.keeps_logits else {}
        out = self.model(
            input_ids=input_ids[None], position_ids=positions[None], use_cache=False, return_dict=True, **keep
        )
        logits: Tensor = out.logits[0]
        return logits if self.keeps_logits else logits[logits_indices]


def load_base_model(folder: Path, name: str, settings: ModelConfig) -> BaseModel:
    """Load the model in `folder` and bind our attention. The caller runs `probe.check` before serving it."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    device = _device(settings.device)
    dtype = compute_dtype(settings.dtype, config)
    model = _load_weights(folder, config, settings, dtype, device).eval().requires_grad_(False)
    nn.Module.to(model, device)  # model.to itself is wrapped by transformers in a way that loses its type
    max_model_len = _max_model_len(name, config, settings.max_model_len)
    _pin_rope(model, max_model_len)
    modules = outline_of(model)
    bound = experts.bind(model, modules.experts)
    modules = replace(modules, experts={name: shape for name, shape in modules.experts.items() if name in bound})
    shared_inputs = SharedInputs()
    with shared_inputs.watching({name: model.get_submodule(name) for name in modules.linears}):
        shapes, attention_layers = _discover_attention(model, name)
    modules = replace(modules, groups=shared_inputs.groups())
    step_context = _suit_to_cpu(model, modules, settings.cpu_threads) if device.type == "cpu" else nullcontext
    context = StepContext(select_backend(device))
    bindings = tuple(LayerBinding(context) for _ in attention_layers)
    for layer, binding in zip(attention_layers, bindings, strict=True):
        bind(layer, binding)
    return BaseModel(
        name=name,
        model=model,
        config=config,
        modules=modules,
        dtype=dtype,
        device=device,
        max_model_len=max_model_len,
        vocab_size=int(config.get_text_config().vocab_size),
        eos_token_ids=_eos_token_ids(model),
        kv_shapes=shapes,
        step_context=step_context,
        context=context,
        bindings=bindings,
        keeps_logits="logits_to_keep" in inspect.signature(model.forward).parameters,
        weights=LiveWeights(lambda: model, _fingerprint(folder, settings)),
        folder=folder,
    )


def _fingerprint(folder: Path, settings: ModelConfig) -> str:
    return f"dummy {settings.seed}" if settings.load_format == "dummy" else fingerprint(folder)


def _suit_to_cpu(
    model: PreTrainedModel, modules: BaseModules, cpu_threads: int | None
) -> Callable[[], AbstractContextManager[None]]:
    """Give the model the CPU's own kernels, where numba is there to compile them; a GPU machine need not have it."""
    if find_spec("numba") is None:
        return nullcontext
    suit: Callable[..., Callable[[], AbstractContextManager[None]]]
    suit = importlib.import_module("server.engine.cpu_model").suit
    return suit(model, modules.groups, cpu_threads)


@contextmanager
def attention_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Run `model` with another attention function for a while."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _load_weights(
    folder: Path, config: PreTrainedConfig, settings: ModelConfig, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """Weights from the folder, in host memory; or random ones, drawn on `device`: a GPU draws billions at once."""
    if settings.load_format == "dummy":
        torch.manual_seed(settings.seed)
        with device:
            model = from_config(config, dtype=dtype, attn_implementation="eager")
    else:
        model = auto_class(config).from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    assert isinstance(model, PreTrainedModel)
    model.set_attn_implementation(ATTENTION_NAME)
    return model


def _device(wanted: str) -> torch.device:
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(wanted)


def compute_dtype(wanted: str, config: PreTrainedConfig) -> torch.dtype:
    """float32 or bfloat16; a checkpoint in anything else (float16 too) is served in bfloat16."""
    if wanted == "auto":
        return torch.float32 if config.dtype in (torch.float32, None) else torch.bfloat16
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if wanted not in dtypes:
        raise ModelRefused(f"--dtype {wanted} is not served; use one of auto, {', '.join(dtypes)}")
    return dtypes[wanted]


def _max_model_len(name: str, config: PreTrainedConfig, wanted: int | None) -> int:
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    if limit is None and wanted is None:
        raise ModelRefused(f"{name} does not say how many positions it has; pass --max-model-len")
    if limit is not None and wanted is not None and wanted > limit:
        raise ModelRefused(f"--max-model-len {wanted} is over the {limit} positions of {name}; lower it")
    return int(wanted if wanted is not None else limit)  # type: ignore[arg-type]


def _eos_token_ids(model: PreTrainedModel) -> frozenset[int]:
    eos: int | list[int] | None = getattr(model.generation_config, "eos_token_id", None)
    if eos is None:
        eos = getattr(model.config.get_text_config(), "eos_token_id", None)
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)


def _pin_rope(model: PreTrainedModel, max_model_len: int) -> None:
    """Fix the frequencies of length-dependent RoPE for `max_model_len` once and for all.

    transformers picks them by the longest position of the whole batch, so one long row would change its
    neighbours' keys and invalidate what the cache holds.
    """
    last = torch.tensor([[max_model_len - 1]])
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        by_layer = kinds if isinstance(kinds, dict) else {None: kinds}
        for layer_type, kind in by_layer.items():
            if kind is None or not ("dynamic" in kind or kind == "longrope"):
                continue
            device = next(module.buffers()).device
            extra = {} if layer_type is None else {"layer_type": layer_type}
            with torch.no_grad():
                module(torch.zeros(1, device=device), last.to(device), **extra)
            if layer_type is None:
                module.rope_type = "default"  # type: ignore[assignment]
            else:
                kinds[layer_type] = "default"  # type: ignore[index]


def _discover_attention(model: PreTrainedModel, name: str) -> tuple[tuple[KVShape, ...], list[nn.Module]]:
    """Which modules call the attention function, in order, and what they hand over. One tiny forward pass."""
    seen: list[tuple[nn.Module, KVShape]] = []

    def observe(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, None]:
        seen.append((module, KVShape(key.shape[1], key.shape[-1], value.shape[-1])))
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1]), None

    AttentionInterface.register(_DISCOVERY_NAME, observe)
    device = next(model.parameters()).device
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    with attention_implementation(model, _DISCOVERY_NAME), torch.inference_mode():
        model(input_ids=ids, position_ids=torch.arange(2, device=device)[None], use_cache=False)
    modules = [module for module, _ in seen]
    layers = model.config.get_text_config().num_hidden_layers
    if len(modules) != layers or len(set(map(id, modules))) != layers:
        raise ModelRefused(
            f"{name}: its attention reached the engine {len(modules)} times for {layers} layers, so its KV cache "
            "cannot be paged; this architecture is not served"
        )
    return tuple(shape for _, shape in seen), modules
