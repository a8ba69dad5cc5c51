"""Servers as processes: waited for, held still with all their children, taken down whole."""

import os
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from loadtest import servers
from loadtest.client import LoadTestFailed

_SERVER = """
import http.server, os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(str(child.pid).encode())
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def _command(port: int) -> list[str]:
    return [sys.executable, "-c", _SERVER, str(port)]


def _child(server: servers.Server) -> int:
    with urllib.request.urlopen(server.url, timeout=10) as reply:
        return int(reply.read())


def _state(pid: int) -> str:
    """As the kernel writes it: S sleeping, T stopped, Z ended but not yet waited for; "" when there is no such one."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


def _wait_for(pid: int, *states: str) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if _state(pid) in states:
            return True
        time.sleep(0.01)
    return False


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="states are read from /proc")


@needs_proc
def test_held_with_its_children_and_released(tmp_path: Path) -> None:
    port = servers.free_port()
    with servers.running(_command(port), port=port, log=tmp_path / "log") as server:
        child = _child(server)
        server.hold()
        assert _wait_for(server.process.pid, "T") and _wait_for(child, "T")
        server.release()
        assert _wait_for(child, "S")
        assert _child(server) == child


@needs_proc
def test_a_held_server_is_taken_down_with_its_children(tmp_path: Path) -> None:
    port = servers.free_port()
    with servers.running(_command(port), port=port, log=tmp_path / "log") as server:
        child = _child(server)
        server.hold()
    assert server.process.returncode is not None
    assert _wait_for(child, "Z", "")


def test_one_that_ended_cannot_be_held(tmp_path: Path) -> None:
    port = servers.free_port()
    with servers.running(_command(port), port=port, log=tmp_path / "log") as server:
        os.killpg(server.process.pid, 9)
        server.process.wait()
        with pytest.raises(LoadTestFailed, match="ended with -9 while it was measured"):
            server.hold()
