"""A folder made once: whole or not there, whoever is killed and however many start at once."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from server.folder_once import folder_once

_KILLED_BUILD = """
import sys, time
from pathlib import Path
from server.folder_once import folder_once

def build(folder):
    (folder / "half.bin").write_bytes(b"half")
    print("building", flush=True)
    time.sleep(60)

folder_once(Path(sys.argv[1]), build)
"""


def _write(text: str):
    def build(folder: Path) -> None:
        (folder / "whole.txt").write_text(text)

    return build


def test_builds_once_and_then_only_reads(tmp_path: Path) -> None:
    target = tmp_path / "cache" / "model"
    assert folder_once(target, _write("first")) == target
    folder_once(target, _write("second"))
    assert (target / "whole.txt").read_text() == "first"


def test_failed_build_leaves_no_folder(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half.bin").write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        folder_once(tmp_path / "model", fail)
    assert [path.name for path in tmp_path.iterdir()] == [".model.lock"]


def test_killed_build_leaves_nothing_half_done(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with subprocess.Popen([sys.executable, "-c", _KILLED_BUILD, str(target)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"building\n"
        process.kill()
    assert not target.exists()
    folder_once(target, _write("whole"))
    assert [path.name for path in target.iterdir()] == ["whole.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model.lock", "model"]


def test_two_starts_build_once(tmp_path: Path) -> None:
    builds: list[int] = []

    def build(folder: Path) -> None:
        builds.append(1)
        time.sleep(0.05)
        (folder / "whole.txt").write_text("whole")

    threads = [threading.Thread(target=folder_once, args=(tmp_path / "model", build)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
