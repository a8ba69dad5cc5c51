"""`loramux check`: would the server take this adapter? The loader's own verdict, without a server.

The base is built on the meta device, so only its config is read, and its weights where an adapter is computed from
them. Prints; decides nothing the loader does not decide.
"""

import json
from pathlib import Path
from typing import Annotated, Literal

import torch
from cyclopts import Parameter
from rich.console import Console
from torch import nn
from transformers import AutoConfig

from adapters.base_weights import BaseWeights
from adapters.checkpoint import CheckpointLimits, LoadedAdapter, load_lora_model
from adapters.errors import AdapterError, AdapterOptionInvalid, AdapterRefused
from adapters.module_names import BaseModules
from adapters.own_tokenizer import OwnTokenizers
from adapters.read_options import NO_OPTIONS, ReadOptions
from server.adapter_progress import computing
from server.adapter_tokenizer import check_files
from server.cli_failure import CommandFailed
from server.cli_options import Count
from server.config import LoRALimits, ModelConfig
from server.default_model import ModelUnavailable, resolve_model
from server.engine.base_model import compute_dtype
from server.engine.live_weights import LiveWeights, fingerprint
from server.engine.model_outline import auto_class, from_config, outline_of
from server.memory_size import format_memory

_LIMITS = LoRALimits()


def check_command(
    folder: Path,
    /,
    *,
    model: str | None = None,
    revision: str | None = None,
    max_lora_rank: Count = _LIMITS.max_lora_rank,
    ignore: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    moe_lora_b_layout: Literal["rank_major", "grouped_by_expert"] | None = None,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> int:
    """Say whether the adapter in FOLDER would be served, and if not, why and what to do. Needs no server.

    Parameters
    ----------
    folder
        A PEFT adapter: adapter_config.json beside safetensors.
    model
        The base it is for, a folder or a hub id; the installed default if unset.
    revision
        Branch, tag or commit of a hub model.
    max_lora_rank
        The server's limit.
    ignore
        Leave out tensors whose whole name matches the pattern, such as '*.inv_freq'; may be given again.
    moe_lora_b_layout
        How B of fused experts is stored, where the adapter's files do not say.
    as_json
        Print the verdict as one line of JSON.
    """
    try:
        options = ReadOptions(ignore=ignore, moe_lora_b_layout=moe_lora_b_layout)
        resolved = resolve_model(model, revision, notify=Console(stderr=True).print)
        base, dtype = outline(resolved.folder)
    except (AdapterOptionInvalid, ModelUnavailable) as error:
        raise CommandFailed(str(error)) from error
    except (OSError, ValueError) as error:
        raise CommandFailed(f"the config of {model} cannot be read: {error}") from error
    limits = CheckpointLimits(max_lora_rank=max_lora_rank, max_adapter_bytes=_LIMITS.max_adapter_bytes)
    try:
        weights, tokenizers = weights_of(resolved.folder, dtype), OwnTokenizers(resolved.folder, check=check_files)
        return check_adapter(
            folder, base, dtype, limits, as_json=as_json, weights=weights, tokenizers=tokenizers, options=options
        )
    except OSError as error:
        raise CommandFailed(f"the weights of {model} cannot be read: {error}") from error


def check_adapter(
    folder: Path,
    base: BaseModules,
    dtype: torch.dtype,
    limits: CheckpointLimits,
    *,
    as_json: bool,
    weights: BaseWeights | None = None,
    tokenizers: OwnTokenizers | None = None,
    options: ReadOptions = NO_OPTIONS,
) -> int:
    """Print the verdict on `folder` against `base`; 0 = it would be served, 1 = refused."""
    console = Console()
    try:
        with computing(folder.name) as progress:
            loaded = load_lora_model(
                folder,
                base,
                limits=limits,
                dtype=dtype,
                weights=weights,
                tokenizers=tokenizers,
                options=options,
                progress=progress,
            )
    except AdapterError as error:
        _print_refusal(error, folder, as_json, console)
        return 1
    _print_verdict(loaded, folder, base, as_json, console)
    return 0


def outline(model_folder: Path) -> tuple[BaseModules, torch.dtype]:
    """The linears of the model in `model_folder` and the dtype it computes in, from its config alone."""
    config = AutoConfig.from_pretrained(model_folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = from_config(config)
    return outline_of(model), compute_dtype(ModelConfig().dtype, config)


def weights_of(model_folder: Path, dtype: torch.dtype) -> BaseWeights:
    """The weights of the model in `model_folder`, loaded when the first of them is asked for. Raises OSError then."""

    def load() -> nn.Module:
        config = AutoConfig.from_pretrained(model_folder, local_files_only=True, trust_remote_code=False)
        model: nn.Module = auto_class(config).from_pretrained(
            model_folder, config=config, dtype=dtype, local_files_only=True, use_safetensors=True
        )
        return model

    return LiveWeights(load, fingerprint(model_folder))


def _print_verdict(loaded: LoadedAdapter, folder: Path, base: BaseModules, as_json: bool, console: Console) -> None:
    report = loaded.report
    if as_json:
        print(json.dumps({"served": True, "version": loaded.model.version, **report.to_dict()}))
        return
    modules = ", ".join(f"{kind} x {count}" for kind, count in report.modules.items())
    lines = [
        f"{folder} would be served on {base.model_type}",
        f"  version   {loaded.model.version}",
        f"  modules   {report.num_modules} of {len(base.linears)}: {modules}",
        f"  rank      {report.lora_rank}, {report.num_params:,} parameters, {format_memory(report.num_bytes)}",
        f"  features  {', '.join(report.features) or 'plain LoRA'}",
        *(f"  {part:9} {count}, {format_memory(report.part_bytes[part])}" for part, count in report.parts.items()),
        *(f"  dropped   {tensor}: changes nothing" for tensor in report.dropped),
        *(f"  ignored   {tensor}, {format_memory(num_bytes)}" for tensor, num_bytes in report.ignored.items()),
        *(f"  warning   {warning}" for warning in report.warnings),
    ]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def _print_refusal(error: AdapterError, folder: Path, as_json: bool, console: Console) -> None:
    refused = error if isinstance(error, AdapterRefused) else None
    if as_json:
        details = {"feature": refused.feature, "tensor": refused.tensor, "fix": refused.fix} if refused else {}
        why = refused.why if refused else str(error)
        print(json.dumps({"served": False, "code": error.code, "why": why, **details}))
        return
    lines = [f"{folder} is refused: {error.code}"]
    if refused is None:
        lines.append(f"  why  {error}")
    else:
        at = refused.tensor or refused.feature
        lines += [f"  why  {refused.why}", *([f"  at   {at}"] if at else []), f"  fix  {refused.fix}"]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
