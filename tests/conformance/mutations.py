"""Good folders with one thing wrong: each must be refused with its documented code, and name what is wrong.

A mutation changes what PEFT wrote for some variant; one whose variant is not served yet waits with it. Files are
written byte by byte, since the safetensors library would refuse to write most of them.
"""

import json
import os.path
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters.errors import RefusalCode as Code
from tests.conformance.making import CONFIG, WEIGHTS

Header = dict[str, Any]


@dataclass
class Folder:
    """A folder taken apart: config, header and data, each of which may be made to lie."""

    path: Path
    config: dict[str, Any]
    header: Header
    data: bytearray
    raw_config: bytes | None = None  # written in place of `config`
    raw_header: bytes | None = None
    length: int | None = None  # declared for the header, when it is to be a lie

    @classmethod
    def read(cls, path: Path) -> "Folder":
        whole = (path / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", whole[:8])
        header = json.loads(whole[8 : 8 + length])
        header.pop("__metadata__", None)
        return cls(path, json.loads((path / CONFIG).read_text()), header, bytearray(whole[8 + length :]))

    def write(self) -> None:
        raw = json.dumps(self.header).encode() if self.raw_header is None else self.raw_header
        length = len(raw) if self.length is None else self.length
        (self.path / WEIGHTS).write_bytes(struct.pack("<Q", length) + raw + bytes(self.data))
        (self.path / CONFIG).write_bytes(
            json.dumps(self.config).encode() if self.raw_config is None else self.raw_config
        )

    def find(self, part: str) -> str:
        return next(name for name in sorted(self.header) if part in name)

    def resize(self, name: str, shape: list[int], dtype: str | None = None) -> None:
        """The tensor becomes one of ones, of this shape; all that comes after it moves."""
        entry = self.header[name]
        begin, end = entry["data_offsets"]
        kind = dtype or entry["dtype"]
        one = {"F32": struct.pack("<f", 1.0), "F64": struct.pack("<d", 1.0), "I8": b"\1", "I64": struct.pack("<q", 1)}
        count = 1
        for size in shape:
            count *= size
        fresh = one[kind] * count
        self.data[begin:end] = fresh
        for other in self.header.values():
            if other["data_offsets"][0] >= end:
                other["data_offsets"] = [place + len(fresh) - (end - begin) for place in other["data_offsets"]]
        entry.update(dtype=kind, shape=shape, data_offsets=[begin, begin + len(fresh)])

    def drop(self, name: str) -> None:
        self.resize(name, [0])
        del self.header[name]


Mutate = Callable[[Folder], str]  # changes the folder; returns what the message must name


@dataclass(frozen=True)
class Negative:
    name: str
    source: str  # the variant whose folder is changed
    mutate: Mutate
    code: Code
    architecture: str = "llama"
    after: tuple[str, ...] = field(default=())  # variants that have to be served for this to be the code

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.source, *self.after)


def renamed(part: str, old: str, new: str) -> Mutate:
    def mutate(folder: Folder) -> str:
        name = folder.find(part)
        folder.header[name.replace(old, new)] = folder.header.pop(name)
        return os.path.commonprefix([module_of(name), module_of(name.replace(old, new))])  # either half may be named

    return mutate


def dropped(part: str) -> Mutate:
    def mutate(folder: Folder) -> str:
        name = folder.find(part)
        folder.drop(name)
        return module_of(name)

    return mutate


def reshaped(part: str, axis: int, by: int) -> Mutate:
    def mutate(folder: Folder) -> str:
        name = folder.find(part)
        shape = list(folder.header[name]["shape"])
        shape[axis] += by
        folder.resize(name, shape)
        return module_of(name)

    return mutate


def with_shape(part: str, change: Callable[[list[int]], list[int]]) -> Mutate:
    def mutate(folder: Folder) -> str:
        name = folder.find(part)
        folder.resize(name, change(list(folder.header[name]["shape"])))
        return name

    return mutate


def stored_as(part: str, dtype: str) -> Mutate:
    def mutate(folder: Folder) -> str:
        name = folder.find(part)
        folder.resize(name, list(folder.header[name]["shape"]), dtype)
        return name

    return mutate


def poisoned(part: str, value: float, *, last: bool = False) -> Mutate:
    def mutate(folder: Folder) -> str:
        name = folder.find(part)
        begin, end = folder.header[name]["data_offsets"]
        at = end - 4 if last else begin
        folder.data[at : at + 4] = struct.pack("<f", value)
        return name

    return mutate


def entry(part: str, **changes: object) -> Mutate:
    """The header's entry of a tensor lies."""

    def mutate(folder: Folder) -> str:
        name = folder.find(part)
        folder.header[name].update(changes)
        return name

    return mutate


def header(change: Callable[[Header, str], object], *, names: bool = True) -> Mutate:
    def mutate(folder: Folder) -> str:
        name = folder.find("lora_A")
        change(folder.header, name)
        return name if names else WEIGHTS

    return mutate


def bytes_of(change: Callable[[Folder], object], names: str = WEIGHTS) -> Mutate:
    def mutate(folder: Folder) -> str:
        change(folder)
        return names

    return mutate


def config(name: str, value: object, names: str | None = None) -> Mutate:
    def mutate(folder: Folder) -> str:
        folder.config[name] = value
        return name if names is None else names

    return mutate


def without(name: str, names: str | None = None) -> Mutate:
    def mutate(folder: Folder) -> str:
        del folder.config[name]
        return name if names is None else names

    return mutate


def raw_config(change: Callable[[str], str], names: str) -> Mutate:
    def mutate(folder: Folder) -> str:
        folder.raw_config = change(json.dumps(folder.config)).encode()
        return names

    return mutate


_TAILS = (".lora_", ".weight", ".bias", ".base_layer", ".token_adapter", ".hada_", ".vera_", ".ia3_l", ".delora_",
          ".miss_", ".ln_tuning")  # fmt: skip


def module_of(name: str) -> str:
    """What a refusal about a tensor names at least: the last part of its module."""
    bare = name.removeprefix("base_model.model.")
    for mark in _TAILS:
        bare = bare.partition(mark)[0]
    return ".".join(bare.split(".")[-2:])
