"""A process of its own that reads one pickled checkpoint and writes its tensors as safetensors: nothing else.

`torch.load(weights_only=True)` refuses what is not a tensor, but it is a parser of hostile input written in Python and
C++, and it has had holes. So before the first byte is looked at, this process gives up what a hole could be used for:
it can open no file and no socket (RLIMIT_NOFILE 0), raise no limit (no capabilities, no new privileges), has no network
where the system grants a namespace, and ends when it takes too much memory or time. It holds the source, the output and
a file for one line of report. Its output is not trusted either: the parent reads it as it reads any adapter.
"""

import contextlib
import ctypes
import io
import json
import os
import resource
from collections.abc import Mapping
from typing import BinaryIO, NoReturn

import torch
from torch import Tensor

from adapters.convert.safetensors_writer import DTYPE_NAMES, write_safetensors

SOURCE_FD, OUTPUT_FD = 0, 3
CPU_SECONDS = 600
_SPARE_BYTES = 1 << 30  # of address space, beside the source and what is made of it
_WRAPPERS = ("state_dict", "model", "module", "lora", "model_state_dict")  # what trainers put a state dict under
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_PR_SET_NO_NEW_PRIVS, _CAPABILITY_VERSION_3 = 38, 0x20080522


class Unreadable(Exception):
    """The checkpoint is refused; the message says what in it."""


def main() -> None:
    """Read SOURCE_FD, write OUTPUT_FD, print one line of JSON. Exit status 0 only if all of it was written."""
    source_bytes = os.fstat(SOURCE_FD).st_size
    source, output = os.fdopen(SOURCE_FD, "rb"), os.fdopen(OUTPUT_FD, "wb")
    _warm_up()
    report = confine(source_bytes)
    try:
        tensors = read_state_dict(source, max_bytes=2 * source_bytes)
        write_safetensors(output, tensors)
    except Unreadable as error:
        _end({"error": str(error)}, 1)
    except MemoryError:
        _end({"error": "reading it takes more memory than a checkpoint of its size can need"}, 1)
    except Exception as error:  # whatever torch raises for what it does not accept
        _end({"error": _first_line(error)}, 1)
    _end(report, 0)


def confine(source_bytes: int) -> dict[str, bool]:
    """Give up files, sockets, privileges, and memory and time past what the source can need; for good."""
    libc = ctypes.CDLL(None, use_errno=True)
    has_own_network = libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) == 0
    _limit(resource.RLIMIT_AS, _mapped_bytes() + 6 * source_bytes + _SPARE_BYTES)
    _limit(resource.RLIMIT_FSIZE, 2 * source_bytes + _SPARE_BYTES)
    _limit(resource.RLIMIT_CPU, CPU_SECONDS)
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_NPROC, resource.RLIMIT_NOFILE):
        _limit(limit, 0)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 or not _drop_capabilities(libc):
        _end({"error": "the process that reads pickles could not give up its privileges"}, 1)
    return {"network_namespace": has_own_network}


def read_state_dict(source: BinaryIO, *, max_bytes: int) -> dict[str, Tensor]:
    """The tensors in the checkpoint by name. Raises Unreadable, and what torch raises."""
    loaded = torch.load(source, map_location="cpu", weights_only=True)
    found = _unwrapped(loaded)
    tensors = {_checked_name(name): _checked_tensor(name, value) for name, value in found.items()}
    if not tensors:
        raise Unreadable("it holds no tensors")
    total = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    if total > max_bytes:
        raise Unreadable(f"its tensors take {total} bytes once they are written out, over the limit of {max_bytes}")
    return tensors


def _unwrapped(loaded: object) -> Mapping[object, object]:
    if not isinstance(loaded, dict):
        raise Unreadable(f"it holds a {type(loaded).__name__}, not a table of tensors by name")
    inner = next((loaded[key] for key in _WRAPPERS if isinstance(loaded.get(key), dict)), None)
    return loaded if inner is None else inner


def _checked_name(name: object) -> str:
    if not isinstance(name, str):
        raise Unreadable(f"a {type(name).__name__} stands where a tensor's name belongs")
    return name


def _checked_tensor(name: object, value: object) -> Tensor:
    if type(value) not in (Tensor, torch.nn.Parameter):
        raise Unreadable(f"{name} is a {type(value).__name__}, not a tensor")
    assert isinstance(value, Tensor)
    tensor = value.detach()
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.dtype not in DTYPE_NAMES:
        kind = f"{tensor.dtype} {tensor.layout} on {tensor.device.type}".replace("torch.", "")
        raise Unreadable(f"{name} is {kind}; read are dense float32, float16 and bfloat16")
    return tensor


def _warm_up() -> None:
    """Read one pickle of each kind, so that nothing has to be imported once no file can be opened."""
    torch.set_num_threads(1)
    for is_zip in (True, False):
        memory = io.BytesIO()
        torch.save(
            {"a": torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))},
            memory,
            _use_new_zipfile_serialization=is_zip,
        )
        memory.seek(0)
        write_safetensors(io.BytesIO(), read_state_dict(memory, max_bytes=64))
    with contextlib.suppress(Exception):  # a refusal is worded by modules that are imported for it
        torch.load(io.BytesIO(b"\x80\x02cos\nsystem\n."), weights_only=True)
    json.dumps({})


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def _mapped_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _drop_capabilities(libc: ctypes.CDLL) -> bool:
    """capset(2) with three empty sets of 64: not even root's limits can be raised any more."""
    header, data = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    return bool(libc.capset(header, data) == 0)


def _first_line(error: Exception) -> str:
    """torch's own reasons go on for pages, and end with advice to turn the check off."""
    text = str(error)
    for mark in ("WeightsUnpickler error: ", "GLOBAL "):
        text = text.partition(mark)[2] or text
    reason = (text.splitlines() or [""])[0].partition(" Please ")[0]
    return f"{type(error).__name__}: {reason[:300].rstrip('.')}"


def _end(report: Mapping[str, object], status: int) -> NoReturn:
    """Without Python's own ending, which would look for files."""
    os.write(1, json.dumps(report).encode() + b"\n")
    os._exit(status)
