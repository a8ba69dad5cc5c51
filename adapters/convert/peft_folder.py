"""A PEFT adapter as a folder: adapter_config.json, adapter_model.safetensors, and the files that came beside them.

A folder is built aside and takes its name when it is whole, so that nobody ever finds half of one.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from adapters.adapter_folder import WEIGHTS_NAME
from adapters.convert.failure import CannotConvert
from adapters.convert.safetensors_writer import write_safetensors
from adapters.lora_config import CONFIG_NAME
from adapters.untrusted_json import shown


@contextmanager
def folder_aside(target: Path) -> Iterator[Path]:
    """An empty folder that becomes `target` when the block ends, and is removed when it raises."""
    _check_free(target)
    aside = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        aside.mkdir(parents=True)
        yield aside
        for path in aside.iterdir():
            _flush(path)
        _flush(aside)
        _check_free(target)
        aside.rename(target)
    except OSError as error:
        raise CannotConvert(f"{shown(str(target))} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _flush(target.parent)


def write_peft_folder(
    folder: Path, config: Mapping[str, object], tensors: Mapping[str, Tensor], companions: Mapping[str, Path]
) -> None:
    """Write the adapter into `folder`, which exists; `companions` are copied there by name."""
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    with (folder / WEIGHTS_NAME).open("wb") as file:
        write_safetensors(file, tensors)
    for name, path in companions.items():
        shutil.copyfile(path, folder / name)


def _check_free(target: Path) -> None:
    if os.path.lexists(target):
        raise CannotConvert(f"{shown(str(target))} is there already; name a folder that is not")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
