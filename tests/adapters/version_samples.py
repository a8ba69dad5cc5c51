"""Small prepared adapters by number, and what a process does that stores them until it is killed."""

import fcntl
import hashlib
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from adapters.adapter_ref import AdapterVersion
from adapters.host_memory import ALIGNMENT
from adapters.lora_model import LoRAModel
from adapters.packed_modules import PackedModules, layout_of
from adapters.version_store import VersionStore

KEY = "base"
SYSTEM_CALLS = ("open", "write", "fsync", "rename", "unlink", "mkdir", "flock")
"""All that a put changes the disk with."""


def version_of(number: int) -> AdapterVersion:
    return AdapterVersion(hashlib.sha256(f"adapter {number}".encode()).hexdigest())


def model_of(number: int, *, lora_rank: int = 3, width: int = 50, dtype: torch.dtype = torch.bfloat16) -> LoRAModel:
    """Like a loaded one: packed, its numbers drawn from `number`."""
    shapes = [(f"model.layers.{layer}.q_proj", lora_rank + layer, width, width + 7) for layer in range(2)]
    layout = layout_of(shapes, align=ALIGNMENT // dtype.itemsize)
    flat = torch.randn(layout.num_elements, generator=torch.Generator().manual_seed(number)).to(dtype)
    norms = MappingProxyType({"q_proj": number / 3})
    return LoRAModel(version_of(number), PackedModules(layout, flat), (f"number {number}", "rslora"), norms)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def assert_same(read: LoRAModel, put: LoRAModel) -> None:
    assert list(read.modules) == list(put.modules)
    for name, weights in put.modules.items():
        for ours, theirs in (
            (read.modules[name].lora_a, weights.lora_a),
            (read.modules[name].lora_b, weights.lora_b),
        ):
            assert (ours.dtype, ours.shape, bits(ours)) == (theirs.dtype, theirs.shape, bits(theirs))
    for field in ("version", "features", "delta_norms", "lora_rank", "num_bytes"):
        assert getattr(read, field) == getattr(put, field), field


def put_together(folder: Path, barrier: Barrier, number: int, times: int) -> None:
    """Store the same versions as other processes at the same moments."""
    store = VersionStore(folder, base_key=KEY)
    for turn in range(times):
        barrier.wait(timeout=600)
        store.put(model_of(number + turn))


def put_until_killed(folder: Path, stored: Connection, first: int) -> None:
    """Store one after the other and say so after each."""
    store = VersionStore(folder, base_key=KEY)
    number = first
    while True:
        store.put(model_of(number, width=20_000))
        stored.send(number)
        number += 1


def put_and_die(folder: Path, number: int, call: int, after: bool) -> None:
    """Die at system call `call` of a put, before it or after it; exit code 0 when there are not so many."""
    store = VersionStore(folder, base_key=KEY)
    count = 0

    def dying(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            here = count == call
            if here and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return original(*args, **kwargs)
            finally:
                if here:
                    os.kill(os.getpid(), signal.SIGKILL)

        return wrapped

    for name in SYSTEM_CALLS:
        owner = owner_of(name)
        setattr(owner, name, dying(getattr(owner, name)))
    store.put(model_of(number))


def owner_of(system_call: str) -> Any:
    """The module it is called through."""

    return fcntl if system_call == "flock" else os
