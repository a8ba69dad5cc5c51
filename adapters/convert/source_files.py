"""SOURCE as it lies on disk: its tensors, the PEFT config beside them if any, and tokenizer files to take along.

A pickle is read by another process (`pickle_reader.py`). Knows nothing of what the tensors mean.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from adapters.adapter_folder import WEIGHTS_NAME
from adapters.convert.failure import CannotConvert
from adapters.convert.pickle_reader import read_pickle
from adapters.convert.stored_tensors import read_file
from adapters.lora_config import CONFIG_NAME, MAX_CONFIG_BYTES
from adapters.read_options import ReadOptions, ignored_among
from adapters.untrusted_json import parse_object, shown

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TRAINER_PICKLES = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")
_FIRST = (WEIGHTS_NAME, "adapter_model.bin")
_COMPANIONS = (
    *("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"),
    *("chat_template.jinja", "tokenizer.model", "vocab.json", "merges.txt"),
)


@dataclass(frozen=True, slots=True)
class Source:
    """`has_own_network`: whether the process that read a pickle had a network namespace of its own; None: no pickle."""

    weights: Path
    tensors: Mapping[str, Tensor]
    config: Mapping[str, object] | None
    companions: Mapping[str, Path]
    has_own_network: bool | None = None

    @property
    def is_pickle(self) -> bool:
        return self.has_own_network is not None

    def without(self, options: ReadOptions) -> tuple["Source", dict[str, int]]:
        """What is left when tensors are ignored, and those with their bytes. Raises AdapterRefused."""
        ignored = ignored_among({name: tensor.nbytes for name, tensor in self.tensors.items()}, options.ignore)
        left = {name: tensor for name, tensor in self.tensors.items() if name not in ignored}
        return replace(self, tensors=left), ignored


def read_source(path: Path) -> Source:
    """Raises CannotConvert, and AdapterRefused for safetensors and JSON that are not what they should be."""
    try:
        weights = _weights_at(path)
        folder = weights.parent
        config = _config_in(folder)
        companions = {name: folder / name for name in _COMPANIONS if config and (folder / name).is_file()}
        if weights.suffix == ".safetensors":
            return Source(weights, read_file(weights), config, companions)
        read = read_pickle(weights)
    except OSError as error:
        raise CannotConvert(f"{shown(str(path))} cannot be read: {error.strerror}") from error
    return Source(weights, read.tensors, config, companions, read.has_own_network)


def _weights_at(path: Path) -> Path:
    if path.is_file():
        if path.suffix not in (".safetensors", *_PICKLES):
            raise CannotConvert(f"{shown(path.name)} is neither safetensors nor one of {', '.join(_PICKLES)}")
        return path
    if not path.is_dir():
        raise CannotConvert(f"there is no {shown(str(path))}")
    found = sorted(each.name for each in path.iterdir() if each.is_file() and _is_weights(each.name))
    chosen = next((name for name in _FIRST if name in found), None) or (found[0] if len(found) == 1 else None)
    if chosen is None:
        several = f"several checkpoints ({', '.join(map(shown, found[:4]))}): name the file that is meant"
        raise CannotConvert(f"{shown(str(path))} holds {several if found else 'no checkpoint'}")
    return path / chosen


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", *_PICKLES)) and not name.startswith(_TRAINER_PICKLES)


def _config_in(folder: Path) -> dict[str, object] | None:
    path = folder / CONFIG_NAME
    if not path.is_file():
        return None
    with path.open("rb") as file:
        data = file.read(MAX_CONFIG_BYTES + 1)
    if len(data) > MAX_CONFIG_BYTES:
        raise CannotConvert(f"{CONFIG_NAME} has over {MAX_CONFIG_BYTES} bytes")
    return parse_object(data, what=CONFIG_NAME)
