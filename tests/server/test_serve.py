"""Starting and stopping, part by part: the port, the adapters named at start, the two signals."""

import asyncio
import io
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from adapters.errors import AdapterRefused, RefusalCode
from server.config import HTTPConfig
from server.lifecycle.control import START_OWNER, WantedAdapter
from server.serve import StartupRefused, bound_socket, drain, load_adapters


class _FakeEngine:
    """Has live requests that end when told to, or at drain(0)."""

    num_live = 2

    def __init__(self) -> None:
        self.ended = asyncio.Event()
        self.timeouts: list[float] = []

    async def drain(self, timeout: float) -> bool:
        self.timeouts.append(timeout)
        if timeout == 0:
            self.ended.set()
        await self.ended.wait()
        return True


def _console() -> Console:
    return Console(file=io.StringIO())


@pytest.mark.asyncio
async def test_drain_waits_for_running_requests() -> None:
    engine, console = _FakeEngine(), _console()
    draining = asyncio.create_task(drain(engine, 30, asyncio.Event(), console))
    await asyncio.sleep(0.01)
    assert not draining.done()
    engine.ended.set()
    await draining
    assert engine.timeouts == [30]
    assert "Finishing 2 requests within 30 s" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.asyncio
async def test_second_signal_ends_at_once() -> None:
    engine, at_once = _FakeEngine(), asyncio.Event()
    draining = asyncio.create_task(drain(engine, 30, at_once, _console()))
    await asyncio.sleep(0.01)
    at_once.set()
    await draining
    assert engine.timeouts == [30, 0]


def test_port_in_use_is_refused_before_anything_slow() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(StartupRefused, match=f"cannot bind 127.0.0.1:{port} .*choose another with --port"),
            bound_socket(HTTPConfig(port=port)),
        ):
            pass


def test_port_zero_takes_a_free_one_and_does_not_listen_yet() -> None:
    with bound_socket(HTTPConfig(port=0)) as sock, socket.socket() as client:
        assert sock.getsockname()[1] > 0
        assert client.connect_ex(sock.getsockname()) != 0


class _FakeLoader:
    """Notes what is asked of it, in order."""

    def __init__(self) -> None:
        self.asked: list[object] = []
        self.owners: dict[str, str] = {}

    async def apply(self, wanted: WantedAdapter) -> None:
        if wanted.name == "bad":
            raise AdapterRefused(RefusalCode.NONFINITE, "3 values are NaN", "Use an earlier checkpoint")
        assert wanted.managed_by == START_OWNER and wanted.load_inplace
        self.asked.append((wanted.name, wanted.source))

    async def forget_start(self, names: Sequence[str]) -> None:
        self.asked.append(list(names))

    def owner_of(self, name: str) -> str | None:
        return self.owners.get(name)


@pytest.mark.asyncio
async def test_adapters_are_loaded_in_the_order_named_and_those_of_an_earlier_start_forgotten() -> None:
    loader = _FakeLoader()
    await load_adapters(loader, [("b", Path("/b")), ("a", Path("/a"))])
    assert loader.asked == [("b", "/b"), ("a", "/a"), ["b", "a"]]


@pytest.mark.asyncio
async def test_a_sample_leaves_a_name_to_who_has_it_and_a_named_adapter_does_not() -> None:
    loader = _FakeLoader()
    loader.owners = {"sql": "api", "json": START_OWNER, "mine": "api"}
    modules = [(name, Path(f"/{name}")) for name in ("sql", "json", "pirate", "mine")]
    await load_adapters(loader, modules, samples={"sql", "json", "pirate"})
    assert loader.asked[:-1] == [("json", "/json"), ("pirate", "/pirate"), ("mine", "/mine")]


@pytest.mark.asyncio
async def test_adapter_that_is_refused_stops_the_start() -> None:
    loader = _FakeLoader()
    with pytest.raises(StartupRefused, match="'bad' from /x cannot be served: .*3 values are NaN. Use an earlier"):
        await load_adapters(loader, [("bad", Path("/x"))])
    assert loader.asked == [], "what an earlier start named was forgotten although this one failed"
