"""`loramux convert`: an adapter that the server refuses as it is → a PEFT folder that `loramux check` accepts.

Offline: nothing of a running server is asked or imported, and the server imports nothing of this. Says what is asked
and shows what came out; the conversions are in `adapters/convert`.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from cyclopts import Parameter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from adapters.checkpoint import CheckpointLimits, load_lora_model
from adapters.convert.base_outline import BaseOutline
from adapters.convert.conversion import Conversion
from adapters.convert.conversion import Progress as OnProgress
from adapters.convert.convert_report import WrittenErrors, compare_written
from adapters.convert.failure import CannotConvert
from adapters.convert.formats import Base, ConvertOptions, Format, convert, format_of
from adapters.convert.peft_folder import folder_aside, write_peft_folder
from adapters.convert.source_files import read_source
from adapters.errors import AdapterError, AdapterRefused
from adapters.lora_config import MAX_CONFIG_BYTES
from adapters.read_options import ReadOptions
from adapters.run_plan import Progress as OnNorms
from adapters.untrusted_json import parse_object
from server.cli_check import outline, weights_of
from server.cli_failure import CommandFailed
from server.cli_options import Count
from server.config import LoRALimits
from server.default_model import ModelUnavailable, ResolvedModel, resolve_model
from server.engine.live_weights import LiveWeights, fingerprint

REPORT_NAME = "convert_report.json"
_LIMITS = LoRALimits()
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFlags:
    """What SOURCE does not say of itself.

    Parameters
    ----------
    alpha
        loralib, pairs: lora_alpha; the scale is alpha / r.
    rank
        loralib, pairs: what the rank must be, of one slice where slices are adapted.
    enable_lora
        loralib's MergedLinear: which slices of the output are adapted, such as true,false,true.
    name_map
        pairs: a JSON file that says which tensors belong to which module.
    ignore
        Leave out tensors whose whole name matches the pattern, such as '*.inv_freq'; may be given again.
    """

    alpha: float | None = None
    rank: Count | None = None
    enable_lora: str | None = None
    name_map: Annotated[Path | None, Parameter(name="--map")] = None
    ignore: Annotated[tuple[str, ...], Parameter(negative="")] = ()

    def options(self, base_name: str) -> ConvertOptions:
        return ConvertOptions(base_name, self.alpha, self.rank, _flags(self.enable_lora), _read_map(self.name_map))


_NOTHING_SAID = SourceFlags()


def convert_command(
    source: Path,
    out: Path,
    /,
    *,
    model: str | None = None,
    revision: str | None = None,
    format: Literal["auto"] | Format = "auto",
    of_source: SourceFlags = _NOTHING_SAID,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    max_lora_rank: Count = _LIMITS.max_lora_rank,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> int:
    """Turn SOURCE into a PEFT adapter in the new folder OUT, and measure how far it is from SOURCE. Needs no server.

    Parameters
    ----------
    source
        A folder, or a checkpoint in it: safetensors, or a pickle, which a process reads that can do nothing else.
    out
        The folder to make. It must not be there yet.
    model
        The base it is for, a folder or a hub id; the installed default if unset.
    revision
        Branch, tag or commit of a hub model.
    format
        What SOURCE is; found out if unset.
    dtype
        Of the tensors written; auto: as in SOURCE, or float32 where they are computed.
    max_lora_rank
        The server's limit, for the check at the end.
    as_json
        Print the report as one line of JSON.
    """
    try:
        ignore = ReadOptions(ignore=of_source.ignore)
        asked = _Asked(source, out, None if format == "auto" else format, _DTYPES.get(dtype), ignore)
        resolved = resolve_model(model, revision, notify=Console(stderr=True).print)
        report = _make(asked, resolved, of_source.options(model or resolved.name), max_lora_rank)
    except (CannotConvert, AdapterError, ModelUnavailable) as error:
        raise CommandFailed(str(error)) from error
    _print(report, out, as_json, Console())
    return 0 if report.verdict["served"] else 1


@dataclass(frozen=True, slots=True)
class _Asked:
    source: Path
    out: Path
    format: Format | None
    dtype: torch.dtype | None
    ignore: ReadOptions


@dataclass(frozen=True, slots=True)
class _Report:
    source: str
    format: Format
    base: str
    dtype: str
    ignored: dict[str, int]
    error: WrittenErrors
    pickle: dict[str, object] | None
    warnings: tuple[str, ...]
    verdict: dict[str, object]

    def to_dict(self) -> dict[str, object]:
        names = ("source", "format", "base", "dtype", "pickle", "ignored")
        plain = {name: getattr(self, name) for name in names}
        return plain | {"warnings": list(self.warnings), "error": self.error.to_dict(), "check": self.verdict}


def _make(asked: _Asked, base: ResolvedModel, options: ConvertOptions, max_lora_rank: int) -> _Report:
    """Read, convert, write aside, measure, check; then the folder takes its name."""
    with folder_aside(asked.out) as aside, _bar() as progress:
        source, ignored = read_source(asked.source).without(asked.ignore)
        kind = format_of(source, asked.format, options)
        conversion = convert(source, kind, _base(base), options, progress)
        if asked.dtype is not None:
            conversion = conversion.in_dtype(asked.dtype)
        write_peft_folder(aside, conversion.config, conversion.tensors, source.companions)
        error = compare_written(aside, conversion, progress)
        progress("checking", 0, 1)
        verdict = _verdict(aside, base, max_lora_rank, partial(progress, "computing norms"))
        report = _Report(
            source=str(asked.source),
            format=kind,
            base=options.base_name,
            dtype=_dtypes(conversion),
            ignored=ignored,
            error=error,
            pickle={"own_network_namespace": source.has_own_network} if source.is_pickle else None,
            warnings=conversion.warnings,
            verdict=verdict,
        )
        (aside / REPORT_NAME).write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    return report


def _base(resolved: ResolvedModel) -> Base:
    """The base's shapes from its config; its weights once they are asked for."""
    return Base(BaseOutline.of(_model_outline(resolved.folder)), lambda: _weights(resolved.folder))


def _model_outline(folder: Path) -> nn.Module:
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        raise CannotConvert(f"the config of the base in {folder} cannot be read: {error}") from error
    assert isinstance(model, nn.Module)
    return model


def _weights(folder: Path) -> tuple[LiveWeights, torch.dtype]:
    """As the checkpoint has them: what PEFT took its decomposition of."""
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
        return LiveWeights(lambda: model, fingerprint(folder)), model.dtype
    except (OSError, ValueError) as error:
        raise CannotConvert(f"the weights of the base in {folder} cannot be read: {error}") from error


def _verdict(folder: Path, base: ResolvedModel, max_lora_rank: int, progress: OnNorms) -> dict[str, object]:
    """What `loramux check` says of the folder."""
    limits = CheckpointLimits(max_lora_rank=max_lora_rank, max_adapter_bytes=_LIMITS.max_adapter_bytes)
    modules, dtype = outline(base.folder)
    try:
        weights = weights_of(base.folder, dtype)
        loaded = load_lora_model(folder, modules, limits=limits, dtype=dtype, weights=weights, progress=progress)
    except AdapterRefused as error:
        return {
            "served": False,
            "code": error.code,
            "why": error.why,
            "at": error.tensor or error.feature,
            "fix": error.fix,
        }
    except AdapterError as error:
        return {"served": False, "code": error.code, "why": str(error), "at": None, "fix": ""}
    warnings = list(loaded.report.warnings)
    return {"served": True, "version": loaded.model.version, "lora_rank": loaded.report.lora_rank, "warnings": warnings}


def _dtypes(conversion: Conversion) -> str:
    return ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in conversion.tensors.values()}))


def _flags(text: str | None) -> tuple[bool, ...] | None:
    if text is None:
        return None
    words = [word.strip().lower() for word in text.split(",")]
    if not set(words) <= {"true", "false"} or "true" not in words:
        raise CannotConvert(f"--enable-lora takes true and false, as in true,false,true, not {text!r}")
    return tuple(word == "true" for word in words)


def _read_map(path: Path | None) -> dict[str, object] | None:
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise CannotConvert(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > MAX_CONFIG_BYTES:
        raise CannotConvert(f"{path} has over {MAX_CONFIG_BYTES} bytes")
    return parse_object(data, what=path.name)


@contextmanager
def _bar() -> Iterator[OnProgress]:
    """A line on stderr that goes away at the end; nothing when stderr is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=None)

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total, refresh=done == 0)

        yield show


def _print(report: _Report, out: Path, as_json: bool, console: Console) -> None:
    if as_json:
        print(json.dumps({"out": str(out), **report.to_dict()}))
        return
    error, verdict = report.error.to_dict(), report.verdict
    lines = [
        f"{out} is made of {report.source} ({report.format}), {error['num_modules']} modules in {report.dtype}",
        f"  error     max {error['max']:.2e}, mean {error['mean']:.2e} of ΔW's elements, against the source in float64",
        f"  worst     {error['worst_relative']:.2e} of ‖ΔW‖, in {error['worst_module']}",
        f"  copied    {error['num_kept_tensors']} tensors, at most {error['kept_max']:.2e} off",
        *(f"  ignored   {tensor}, {num_bytes} bytes" for tensor, num_bytes in report.ignored.items()),
        *(f"  warning   {warning}" for warning in report.warnings),
    ]
    if verdict["served"]:
        lines += [f"  check     would be served as version {verdict['version']}, rank {verdict['lora_rank']}"]
    else:
        lines += [
            f"  check     refused: {verdict['code']}, {verdict['at']}",
            f"  why       {verdict['why']}",
            f"  fix       {verdict['fix']}",
        ]
    console.print(
        "\n".join([*lines, f"  report    {out / REPORT_NAME}"]), highlight=False, markup=False, soft_wrap=True
    )
