"""Pickles: plain tensors come through to the bit, everything else is refused by name, and nothing gets out."""

import io
import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.convert import pickle_reader
from adapters.convert.failure import CannotConvert
from adapters.convert.pickle_child import Unreadable, read_state_dict
from adapters.convert.pickle_reader import read_pickle
from adapters.errors import AdapterRefused

_ROOT = Path(__file__).parents[3]


class _Payload:
    """What pickles do: calls a function of its choice when it is read."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


class _Custom:
    """A class of somebody's own."""


def _tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a.lora_A": torch.randn(4, 8),
        "a.lora_B": torch.randn(8, 4).bfloat16(),
        "half": torch.randn(3).half(),
        "turned": torch.randn(5, 7).T,
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "scalar": torch.tensor(3.0),
    }


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_plain_tensors_come_through_to_the_bit(tmp_path: Path, is_zip: bool) -> None:
    tensors = _tensors()
    torch.save(tensors, tmp_path / "x.pt", _use_new_zipfile_serialization=is_zip)
    read = read_pickle(tmp_path / "x.pt").tensors
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor.detach()), name


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "module", "model_state_dict"])
def test_a_state_dict_is_found_where_trainers_put_it(wrapper: str) -> None:
    memory = io.BytesIO()
    torch.save({wrapper: _tensors(), "step": 3}, memory)
    memory.seek(0)
    assert read_state_dict(memory, max_bytes=4096).keys() == _tensors().keys()


def test_tensors_that_share_memory_are_written_each(tmp_path: Path) -> None:
    whole = torch.randn(64, 64)
    torch.save({"first": whole[:32], "second": whole[32:], "again": whole[:32]}, tmp_path / "x.bin")
    read = read_pickle(tmp_path / "x.bin").tensors
    assert torch.equal(read["second"], whole[32:]) and torch.equal(read["again"], whole[:32])


_REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "os.system": (lambda mark: {"a": torch.zeros(2), "b": _Payload(os.system, f"touch {mark}")}, "posix.system"),
    "eval": (lambda mark: {"a": _Payload(eval, f"open({str(mark)!r}, 'w')")}, "eval"),
    "getattr": (lambda mark: {"a": _Payload(getattr, "text", "upper")}, "getattr"),
    "own class": (lambda mark: {"a": _Custom()}, "_Custom"),
    "list": (lambda mark: [torch.zeros(2)], "a list"),
    "bare tensor": (lambda mark: torch.zeros(2), "a Tensor"),
    "nested": (lambda mark: {"a": {"b": torch.zeros(2)}}, "a is a dict"),
    "number": (lambda mark: {"a": torch.zeros(2), "step": 3}, "step is a int"),
    "name": (lambda mark: {7: torch.zeros(2)}, "tensor's name"),
    "integers": (lambda mark: {"a": torch.zeros(2, dtype=torch.int64)}, "a is int64"),
    "float64": (lambda mark: {"a": torch.zeros(2, dtype=torch.float64)}, "a is float64"),
    "sparse": (lambda mark: {"a": torch.eye(4).to_sparse()}, "a is"),
    "expanded": (lambda mark: {"a": torch.zeros(1).expand(1 << 34)}, "over the limit"),
    "empty": (lambda mark: {}, "no tensors"),
}


@pytest.mark.parametrize("case", _REFUSED)
def test_what_is_no_table_of_tensors_is_refused(case: str, tmp_path: Path) -> None:
    make, named = _REFUSED[case]
    mark = tmp_path / "it-ran"
    memory = io.BytesIO()
    torch.save(make(mark), memory)
    memory.seek(0)
    with pytest.raises((Unreadable, pickle.UnpicklingError), match=named):
        read_state_dict(memory, max_bytes=1 << 20)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (_REFUSED["os.system"][0], "UnpicklingError: posix.system"),
        (_REFUSED["eval"][0], "UnpicklingError: eval was not an allowed global"),
        (_REFUSED["nested"][0], "a is a dict, not a tensor"),
        (lambda mark: {"a\nb": torch.zeros(2)}, "the tensor's name"),
        (lambda mark: {"a": torch.zeros(2), "b": torch.zeros(0)}, "non-empty"),
    ],
    ids=["os.system", "eval", "nested", "odd name", "no numbers"],
)
def test_the_reason_is_one_line_that_says_what(make: Callable[[Path], object], why: str, tmp_path: Path) -> None:
    mark = tmp_path / "it-ran"
    torch.save(make(mark), tmp_path / "x.bin")
    with pytest.raises((CannotConvert, AdapterRefused), match=re.escape(why)) as refused:
        read_pickle(tmp_path / "x.bin")
    assert str(refused.value).isprintable() and "add_safe_globals" not in str(refused.value)
    assert not mark.exists()


@pytest.mark.parametrize(
    "data",
    [b"", pickle.dumps(_Payload(os.getcwd)), b"PK\x03\x04" + bytes(64)],
    ids=["empty", "bare payload", "broken zip"],
)
def test_what_torch_did_not_write_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(CannotConvert, match=r"x\.pt is not a checkpoint of plain tensors"):
        read_pickle(tmp_path / "x.pt")


def test_a_zip_that_grows_is_stopped_by_the_memory_limit(tmp_path: Path) -> None:
    memory = io.BytesIO()
    torch.save({"a": torch.zeros(1 << 20)}, memory)
    bomb = tmp_path / "x.pt"
    with zipfile.ZipFile(memory) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            data = source.read(name)
            target.writestr(name, bytes(3 << 30) if name.endswith("data/0") else data)
    with pytest.raises(CannotConvert, match="allocate memory"):
        read_pickle(bomb)


# What code that got loose in there could do.

_LOOSE = """
import json, os, resource, socket, sys
sys.path.append(sys.argv[1])
import torch
from adapters.convert import pickle_child

def attempts(*_, **__):
    acts = {
        "socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM),
        "unix socket": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM),
        "pair": socket.socketpair,
        "read": lambda: os.open("/etc/passwd", os.O_RDONLY),
        "write": lambda: os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT),
        "pipe": os.pipe,
        "dup": lambda: os.dup(0),
        "limit": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)),
        "memory limit": lambda: resource.setrlimit(resource.RLIMIT_AS, (-1, -1)),
        "memory": lambda: bytearray(4 << 30),
        "setuid": lambda: os.chroot("/"),
    }
    found = {"cpu": resource.getrlimit(resource.RLIMIT_CPU)[1] <= pickle_child.CPU_SECONDS}
    for name, act in acts.items():
        try:
            act()
            found[name] = False
        except (OSError, ValueError, MemoryError):
            found[name] = True
    raise pickle_child.Unreadable(json.dumps(found))

confine = pickle_child.confine
def confine_then_break_loose(source_bytes):
    report = confine(source_bytes)
    torch.load = attempts
    return report
pickle_child.confine = confine_then_break_loose
if sys.argv[3] == "without namespaces":
    pickle_child._CLONE_NEWUSER = pickle_child._CLONE_NEWNET = 0
pickle_child.main()
"""


@pytest.mark.parametrize("how", ["with namespaces", "without namespaces"])
def test_code_that_got_loose_can_open_neither_socket_nor_file(how: str, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "x.pt")
    with (tmp_path / "x.pt").open("rb") as source, (tmp_path / "out").open("wb") as output:
        start = f"import os; os.dup2({output.fileno()}, 3)\n{_LOOSE}"
        command = [sys.executable, "-I", "-c", start, str(_ROOT), str(tmp_path / "written"), how]
        done = subprocess.run(command, stdin=source, capture_output=True, pass_fds=[output.fileno()], check=False)
    said = json.loads(done.stdout)
    stopped = json.loads(said["error"])
    assert done.returncode == 1 and len(stopped) == 12
    assert {name for name, is_stopped in stopped.items() if not is_stopped} == set()
    assert not (tmp_path / "written").exists() and (tmp_path / "out").stat().st_size == 0


def test_the_child_sees_nothing_of_our_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token in the environment would be what such a pickle is after."""
    seen = []
    run = subprocess.run

    def spy(*arguments: Any, **options: Any) -> Any:
        seen.append(options["env"])
        return run(*arguments, **options)

    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr(pickle_reader.subprocess, "run", spy)
    torch.save({"a": torch.zeros(2)}, tmp_path / "x.pt")
    read_pickle(tmp_path / "x.pt")
    assert seen and "secret" not in seen[0].values()


def test_a_child_that_comes_to_no_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "x.pt")
    monkeypatch.setattr(pickle_reader, "_START", "import time; time.sleep(60)")
    monkeypatch.setattr(pickle_reader, "_WALL_SECONDS", 0.5)
    with pytest.raises(CannotConvert, match="came to no end"):
        read_pickle(tmp_path / "x.pt")
