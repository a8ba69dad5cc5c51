"""Downloads from a web server: what is asked for, where redirects lead, limits, failures, what is left on disk."""

import asyncio
import errno
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from adapters.adapter_ref import AdapterVersion
from adapters.checkpoint import CheckpointLimits, load_lora_model
from adapters.errors import AdapterError, AdapterNotFound, AdapterRefused, RefusalCode
from adapters.lora_config import CONFIG_NAME
from adapters.own_tokenizer import NAMES as TOKENIZER_NAMES
from server.lifecycle.sources.disk import Disk
from server.lifecycle.sources.errors import (
    AdapterSourceNotAllowed,
    AdapterSourceUnreachable,
    AdapterStorageFailed,
    AdapterStorageFull,
)
from server.lifecycle.sources.in_thread import in_thread
from server.lifecycle.sources.sources import SourceLimits, Sources
from server.lifecycle.sources.staging import Staging
from tests.adapters.hostile import WEIGHTS, draft, healthy, write_safetensors
from tests.server.fakes import TINY_BASE
from tests.server.lifecycle.failing_disk import FailingDisk
from tests.server.lifecycle.web_server import (
    Answer,
    Handler,
    WebServer,
    chunked,
    cut_off,
    hanging,
    redirect,
    status,
    web_server,
    whole,
)

LIMITS = CheckpointLimits(max_lora_rank=16, max_adapter_bytes=1 << 20)
MAX_BYTES = 1 << 20


@dataclass
class World:
    place: Path
    web: WebServer
    other: WebServer  # of another origin, not allowed
    adapter: Path
    made: list[Sources] = field(default_factory=list)

    @property
    def staging(self) -> Path:
        return self.place / "staging"

    def sources(self, *, disk: Disk | None = None, timeout: float = 10.0, max_seconds: float = 60.0) -> Sources:
        limits = SourceLimits(max_bytes=MAX_BYTES, timeout=timeout, max_seconds=max_seconds)
        allowed = [f"{self.web.url}/allowed", f"{self.web.url}/also"]
        self.made.append(Sources(allowed_urls=allowed, staging=self.staging, limits=limits, disk=disk))
        return self.made[-1]

    async def load(self, source: str = "", sources: Sources | None = None) -> AdapterVersion:
        async with (sources or self.sources()).fetched(source or f"{self.web.url}/allowed/a") as folder:
            return load_lora_model(folder, TINY_BASE, limits=LIMITS, dtype=torch.float32).model.version

    def left(self) -> list[Path]:
        """What fetches have left; the empty folder of each process stays while it lives."""
        return [path for process in self.staging.iterdir() for path in process.rglob("*")]

    async def gone(self) -> None:
        deadline = time.monotonic() + 30
        while self.left():
            assert time.monotonic() < deadline, f"left behind: {self.left()}"
            await asyncio.sleep(0.02)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with web_server() as web, web_server() as other:
        world = World(tmp_path, web, other, healthy(tmp_path / "adapter", TINY_BASE))
        web.serve(world.adapter, "/allowed/a")
        other.serve(world.adapter, "/allowed/a")
        yield world
        web.over.set()
        for sources in world.made:
            sources.close()
        assert list(world.staging.iterdir()) == []


def wanted(world: World) -> AdapterVersion:
    return load_lora_model(world.adapter, TINY_BASE, limits=LIMITS, dtype=torch.float32).model.version


@pytest.mark.asyncio
async def test_a_folder_of_a_web_server(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "GOOGLE_API_KEY"):
        monkeypatch.setenv(name, "hunter2")
    reports: list[tuple[int, int | None]] = []
    loop_thread = threading.get_ident()

    def progress(done: int, total: int | None) -> None:
        assert threading.get_ident() == loop_thread
        reports.append((done, total))

    async with world.sources().fetched(f"{world.web.url}/allowed/a/", progress) as folder:
        assert folder.path.is_relative_to(world.staging)
        for path in (world.staging, folder.path.parent, folder.path):
            assert stat.S_IMODE(path.stat().st_mode) == 0o700
        for name in (CONFIG_NAME, WEIGHTS):
            assert (folder.path / name).read_bytes() == (world.adapter / name).read_bytes()
            assert stat.S_IMODE((folder.path / name).stat().st_mode) == 0o600
        assert load_lora_model(folder, TINY_BASE, limits=LIMITS, dtype=torch.float32).model.version == wanted(world)
    assert world.left() == []
    assert world.web.paths == [f"/allowed/a/{name}" for name in (CONFIG_NAME, WEIGHTS, *TOKENIZER_NAMES)]
    assert "hunter2" not in str(world.web.requests)
    total = sum((world.adapter / name).stat().st_size for name in (CONFIG_NAME, WEIGHTS))
    assert reports[-1] == (total, total)
    assert [done for done, _ in reports] == sorted(done for done, _ in reports)


@pytest.mark.asyncio
async def test_a_sharded_adapter(world: World) -> None:
    sharded = world.place / "sharded"
    made = draft(sharded, TINY_BASE)
    made.write()
    (sharded / WEIGHTS).unlink()
    shards = {f"adapter_model-{number:05}.safetensors": name for number, name in enumerate(sorted(made.tensors))}
    for shard, name in shards.items():
        write_safetensors(sharded / shard, {name: made.tensors[name]})
    weight_map = {name: shard for shard, name in shards.items()}
    (sharded / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (sharded / "unrelated.safetensors").write_bytes(b"x" * MAX_BYTES)
    world.web.serve(sharded, "/allowed/sharded")
    assert await world.load(f"{world.web.url}/allowed/sharded") == wanted(world)
    assert not any("unrelated" in path for path in world.web.paths)
    assert world.left() == []


# Redirects.


@pytest.mark.asyncio
@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
async def test_redirects_within_the_allow_list_are_followed(world: World, code: int) -> None:
    for name in (CONFIG_NAME, WEIGHTS):
        world.web.answers[f"/also/b/{name}"] = redirect(f"/allowed/a/{name}?signature=x", code)
        world.web.answers[f"/allowed/c/{name}"] = redirect(f"{world.web.url}/also/b/{name}", code)
    assert await world.load(f"{world.web.url}/allowed/c") == wanted(world)


OUTSIDE: dict[str, Callable[[World], str]] = {
    "another port": lambda w: f"{w.other.url}/allowed/a/{CONFIG_NAME}",
    "another name of the host": lambda w: f"http://localhost:{w.web.port}/allowed/a/{CONFIG_NAME}",
    "without a scheme": lambda w: f"//127.0.0.1:{w.other.port}/allowed/a/{CONFIG_NAME}",
    "another path": lambda w: f"/elsewhere/{CONFIG_NAME}",
    "a path that begins alike": lambda w: f"/allowed-not/{CONFIG_NAME}",
    "up and away": lambda w: f"/allowed/../elsewhere/{CONFIG_NAME}",
    "up and away, encoded": lambda w: f"/allowed/%2e%2e/elsewhere/{CONFIG_NAME}",
    "up and away, encoded twice": lambda w: f"/allowed/%252e%252e/elsewhere/{CONFIG_NAME}",
    "a user name": lambda w: f"http://127.0.0.1:{w.web.port}@127.0.0.1:{w.other.port}/allowed/a/{CONFIG_NAME}",
    "a backslash": lambda w: f"http://127.0.0.1:{w.other.port}\\@127.0.0.1:{w.web.port}/allowed/a/{CONFIG_NAME}",
    "a fragment": lambda w: f"http://127.0.0.1:{w.other.port}/#{w.web.url}/allowed/a",
    "a file": lambda w: f"file://{w.adapter}/{CONFIG_NAME}",
    "a file, upper case": lambda w: f"FILE://{w.adapter}/{CONFIG_NAME}",
    "ftp": lambda w: f"ftp://127.0.0.1:{w.other.port}/{CONFIG_NAME}",
    "data": lambda w: "data:application/json,{}",
    "gopher": lambda w: "gopher://127.0.0.1/x",
    "the metadata service": lambda w: "http://169.254.169.254/latest/meta-data/",
    "https": lambda w: f"https://127.0.0.1:{w.web.port}/allowed/a/{CONFIG_NAME}",
}


@pytest.mark.asyncio
@pytest.mark.parametrize("case", OUTSIDE)
async def test_redirects_out_of_the_allow_list_are_not_followed(world: World, case: str) -> None:
    config = (world.adapter / CONFIG_NAME).read_bytes()
    for path in ("/elsewhere", "/allowed-not"):
        world.web.answers[f"{path}/{CONFIG_NAME}"] = whole(config)
    world.web.answers[f"/allowed/r/{CONFIG_NAME}"] = redirect(OUTSIDE[case](world))
    with pytest.raises((AdapterSourceNotAllowed, AdapterSourceUnreachable)) as caught:
        await world.load(f"{world.web.url}/allowed/r")
    assert world.other.requests == []
    assert world.web.paths == [f"/allowed/r/{CONFIG_NAME}"]
    assert caught.value.status in (403, 503)
    assert world.left() == []


@pytest.mark.asyncio
async def test_redirects_in_a_ring_end(world: World) -> None:
    world.web.answers[f"/allowed/r/{CONFIG_NAME}"] = redirect(f"/allowed/r/{CONFIG_NAME}")
    with pytest.raises(AdapterSourceUnreachable):
        await world.load(f"{world.web.url}/allowed/r")
    assert len(world.web.requests) < 20


@pytest.mark.asyncio
@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
async def test_the_body_of_a_redirect_is_not_read(world: World, code: int) -> None:
    """It would come before any limit: on what a file may have, and on how long it may take."""
    sent: list[int] = []

    def endless(handler: Handler) -> None:
        handler.send(code, {"Location": f"/allowed/a/{CONFIG_NAME}", "Connection": "close"}, b"")
        handler.close_connection = True
        try:
            while sum(sent) < 100 << 20:
                sent.append(handler.wfile.write(b"x" * (1 << 20)))
        except OSError:
            return

    world.web.answers[f"/allowed/r/{CONFIG_NAME}"] = endless
    world.web.answers[f"/allowed/r/{WEIGHTS}"] = redirect(f"/allowed/a/{WEIGHTS}")
    assert await world.load(f"{world.web.url}/allowed/r") == wanted(world)
    assert sum(sent) < 50 << 20  # what fits into the sockets' buffers


@pytest.mark.asyncio
async def test_the_signature_of_a_redirect_is_not_told(world: World) -> None:
    world.web.answers[f"/allowed/r/{CONFIG_NAME}"] = redirect(f"/also/r/{CONFIG_NAME}?X-Sig=hunter2")
    world.web.answers[f"/also/r/{CONFIG_NAME}"] = redirect("/elsewhere")
    with pytest.raises(AdapterSourceNotAllowed, match=f"/also/r/{CONFIG_NAME}") as caught:
        await world.load(f"{world.web.url}/allowed/r")
    assert "hunter2" not in str(caught.value)


# What else can go wrong out there.

BODY = b"{}"


def _garbage(handler: Handler) -> None:
    handler.wfile.write(b"\x00\xff not http at all \r\n\r\n")
    handler.close_connection = True


FAILURES: dict[str, tuple[Answer, type[AdapterError], int]] = {
    "401": (status(401), AdapterNotFound, 404),
    "403": (status(403), AdapterNotFound, 404),
    "404": (status(404), AdapterNotFound, 404),
    "500": (status(500, b"password hunter2"), AdapterSourceUnreachable, 503),
    "429": (status(429), AdapterSourceUnreachable, 503),
    "204": (status(204), AdapterSourceUnreachable, 503),
    "206": (status(206, BODY), AdapterSourceUnreachable, 503),
    "304": (status(304), AdapterSourceUnreachable, 503),
    "broken off": (cut_off(b"x" * 1000, 5000), AdapterSourceUnreachable, 503),
    "broken off within a chunk": (cut_off(b"", 100), AdapterSourceUnreachable, 503),
    "garbage": (_garbage, AdapterSourceUnreachable, 503),
    "silent": (hanging(b"x" * 1000, 5000), AdapterSourceUnreachable, 503),
    "compressed": (whole(BODY, Content_Encoding="gzip"), AdapterSourceUnreachable, 503),
    "declared too large": (whole(b"", Content_Length=str(1 << 40)), AdapterRefused, 400),
    "too large, undeclared": (chunked(b"x" * 4096, 1 << 20), AdapterRefused, 400),
}


@pytest.mark.asyncio
@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS])
@pytest.mark.parametrize("case", FAILURES)
async def test_failures_of_the_remote_end_leave_nothing(world: World, case: str, name: str) -> None:
    answer, kind, code = FAILURES[case]
    world.web.answers[f"/allowed/a/{name}"] = answer
    with pytest.raises(kind) as caught:
        await world.load(sources=world.sources(timeout=0.5))
    assert caught.value.status == code
    assert "hunter2" not in str(caught.value)
    if isinstance(caught.value, AdapterRefused):
        assert caught.value.reason is RefusalCode.TOO_LARGE
    if isinstance(caught.value, AdapterSourceUnreachable):
        assert caught.value.retry_after > 0
    assert world.left() == []


@pytest.mark.asyncio
async def test_nobody_listens(world: World) -> None:
    with web_server() as web:
        url = web.url
    sources = Sources(allowed_urls=[url], staging=world.staging, limits=SourceLimits(max_bytes=1))
    world.made.append(sources)
    with pytest.raises(AdapterSourceUnreachable, match="ConnectionRefusedError"):
        await world.load(f"{url}/a", sources)


@pytest.mark.asyncio
async def test_a_slow_server_is_given_up(world: World) -> None:
    """It is never silent for long, and would go on for a year."""

    def drip(handler: Handler) -> None:
        handler.send(200, {"Content-Length": "1000000"}, b"")
        try:
            while not handler.web.over.wait(0.05):
                handler.wfile.write(b"x")
        except OSError:
            handler.close_connection = True

    world.web.answers[f"/allowed/a/{WEIGHTS}"] = drip
    with pytest.raises(AdapterSourceUnreachable, match=r"within 0\.5 s"):
        await world.load(sources=world.sources(max_seconds=0.5))
    assert world.left() == []


@pytest.mark.asyncio
@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\nX-Slow: ", b"HTTP/1.1 100 Continue\r\nX-Slow: "])
async def test_a_server_that_is_slow_with_its_headers_is_given_up(world: World, head: bytes) -> None:
    def drip(handler: Handler) -> None:
        handler.close_connection = True
        try:
            handler.wfile.write(head)
            while not handler.web.over.wait(0.05):
                handler.wfile.write(b"x")
        except OSError:
            return

    world.web.answers[f"/allowed/a/{WEIGHTS}"] = drip
    with pytest.raises(AdapterSourceUnreachable, match="in time"):
        async with asyncio.timeout(20):
            await world.load(sources=world.sources(max_seconds=0.5))
    assert world.left() == []


@pytest.mark.asyncio
async def test_an_adapter_that_is_refused_leaves_nothing(world: World) -> None:
    world.web.answers[f"/allowed/a/{CONFIG_NAME}"] = whole(b"{}")
    with pytest.raises(AdapterRefused):
        await world.load()
    assert world.left() == []


# Cancelled, killed, out of disk.


@pytest.mark.asyncio
async def test_a_cancelled_fetch_leaves_nothing_and_ends_at_once(world: World) -> None:
    world.web.answers[f"/allowed/a/{WEIGHTS}"] = hanging(b"x" * 100_000, 200_000)
    sources = world.sources(timeout=60)
    task = asyncio.create_task(world.load(sources=sources))
    while len(world.left()) < 3 or max(p.stat().st_size for p in world.left() if p.is_file()) < 100_000:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert world.left() != [], "the thread still waits for the server"
    world.web.over.set()
    await world.gone()
    world.web.over.clear()
    world.web.answers[f"/allowed/a/{WEIGHTS}"] = whole((world.adapter / WEIGHTS).read_bytes())
    assert await world.load(sources=sources) == wanted(world)


@pytest.mark.asyncio
async def test_fetches_cancelled_at_any_moment_leave_nothing(world: World) -> None:
    sources = world.sources()
    for number in range(60):
        task = asyncio.create_task(world.load(sources=sources))
        await asyncio.sleep(number * 0.0005)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await world.gone()


@pytest.mark.asyncio
async def test_fetches_of_one_source_do_not_meet(world: World) -> None:
    sources = world.sources()
    assert set(await asyncio.gather(*(world.load(sources=sources) for _ in range(12)))) == {wanted(world)}
    assert world.left() == []


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ENOSPC, AdapterStorageFull), (errno.EDQUOT, AdapterStorageFull), (errno.EIO, AdapterStorageFailed)],
)
async def test_the_disk_fails_at_each_of_its_calls(world: World, number: int, kind: type[AdapterError]) -> None:
    disk = FailingDisk(number)
    sources = world.sources(disk=disk)
    for failing in range(1000):
        disk.fail_at(failing)
        try:
            version = await world.load(sources=sources)
        except kind as error:
            assert error.status == (507 if kind is AdapterStorageFull else 500)
            assert world.left() == []
            continue
        break
    assert version == wanted(world)
    assert failing >= 5, "a folder, two files made, two written"


@pytest.mark.asyncio
async def test_short_writes_are_continued(world: World) -> None:
    assert await world.load(sources=world.sources(disk=FailingDisk(0, max_write=777))) == wanted(world)


def test_what_a_killed_process_left_is_removed_and_what_a_live_one_has_is_not(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from server.lifecycle.sources.staging import Staging\n"
        "folder = Staging(Path(sys.argv[1])).new_folder(); (folder / 'part').write_bytes(b'x')\n"
        "print('ready', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    with process:
        first = Staging(tmp_path)
        assert len(list(tmp_path.glob("*/*/part"))) == 1, "its process lives"
        first.close()
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(list(tmp_path.glob("*/*/part"))) == 1
    second = Staging(tmp_path)
    assert [path for path in tmp_path.iterdir() if path != second.folder] == []
    second.close()
    assert list(tmp_path.iterdir()) == []


def test_leftovers_that_are_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "kept").write_text("x")
    (tmp_path / "staging").mkdir()
    (tmp_path / "staging" / "link").symlink_to(tmp_path / "outside")
    dead = tmp_path / "staging" / "dead"
    dead.mkdir()
    (dead / "link").symlink_to(tmp_path / "outside")
    Staging(tmp_path / "staging").close()
    assert not dead.exists()
    assert (tmp_path / "outside" / "kept").exists()


# Work in threads.


@pytest.mark.asyncio
async def test_what_a_thread_returns_to_nobody_is_discarded() -> None:
    begun, go_on, discarded, stopped = threading.Event(), threading.Event(), threading.Event(), threading.Event()

    def work() -> str:
        begun.set()
        assert go_on.wait(30)
        return "made"

    async def wait_for(event: threading.Event) -> None:
        assert await asyncio.to_thread(event.wait, 30)

    task = asyncio.create_task(
        in_thread(work, discard=lambda made: made == "made" and discarded.set(), on_cancel=stopped.set)
    )
    await wait_for(begun)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert stopped.is_set() and not discarded.is_set()
    go_on.set()
    await wait_for(discarded)


@pytest.mark.asyncio
async def test_work_that_is_waited_for_ends_before_the_cancellation() -> None:
    begun, go_on, over = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        assert go_on.wait(30)
        over.set()
        raise OSError("nobody asks")

    task = asyncio.create_task(in_thread(work, wait_if_cancelled=True))
    await asyncio.to_thread(begun.wait, 30)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0.01)
    assert not task.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert over.is_set()


@pytest.mark.asyncio
async def test_descriptors_are_given_back(world: World) -> None:
    sources = world.sources()
    local = str(world.adapter)
    await world.load(sources=sources)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        await world.load(sources=sources)
        await world.load(local, sources)
        for source in (f"{world.web.url}/allowed/none", "/nowhere", str(world.place)):
            with pytest.raises(AdapterNotFound):
                await world.load(source, sources)
    assert len(os.listdir("/proc/self/fd")) <= before + 4


@pytest.mark.asyncio
async def test_what_mlx_writes_and_a_tokenizer_are_fetched_too(world: World) -> None:
    (world.adapter / WEIGHTS).rename(world.adapter / "adapters.safetensors")
    (world.adapter / "chat_template.jinja").write_text("{{ messages }}")
    world.web.serve(world.adapter, "/allowed/mlx")
    async with world.sources().fetched(f"{world.web.url}/allowed/mlx", lambda *_: None) as folder:
        names = {path.name for path in folder.path.iterdir()}
    assert names == {CONFIG_NAME, "adapters.safetensors", "chat_template.jinja"}
    assert world.left() == []
