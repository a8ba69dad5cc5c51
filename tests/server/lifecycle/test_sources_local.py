"""Local folders: every spelling and every file that could lead out of the allowed roots, and links swapped meanwhile.

Outside of the root lies an adapter that would load if it were reached; the kernel is asked whether it was opened.
"""

import os
import shutil
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from adapters.adapter_folder import AdapterFolder
from adapters.adapter_ref import AdapterVersion
from adapters.checkpoint import CheckpointLimits, load_lora_model
from adapters.errors import AdapterError, AdapterNotFound
from adapters.lora_config import CONFIG_NAME
from server.lifecycle.sources.errors import AdapterSourceNotAllowed
from server.lifecycle.sources.sources import SourceLimits, Sources
from tests.adapters.hostile import WEIGHTS, healthy
from tests.server.fakes import TINY_BASE
from tests.server.lifecycle.opens import watched

LIMITS = CheckpointLimits(max_lora_rank=16, max_adapter_bytes=1 << 20)
FILES = (CONFIG_NAME, WEIGHTS)


def version_in(folder: AdapterFolder | Path) -> AdapterVersion:
    return load_lora_model(folder, TINY_BASE, limits=LIMITS, dtype=torch.float32).model.version


@dataclass
class World:
    """`root` is allowed and holds the adapter `good`; `secret` lies beside it."""

    place: Path
    sources: Sources
    cleanup: ExitStack

    @property
    def root(self) -> Path:
        return self.place / "räume"  # in normal form C

    @property
    def secret(self) -> Path:
        return self.place / "secret"

    def good(self, name: str) -> Path:
        return healthy(self.root / name, TINY_BASE, seed=1)

    def held_open(self, path: Path) -> int:
        descriptor = os.open(path, os.O_RDONLY)
        self.cleanup.callback(os.close, descriptor)
        return descriptor

    async def load(self, source: str) -> AdapterVersion:
        async with self.sources.fetched(source) as folder:
            return version_in(folder)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with ExitStack() as cleanup:
        limits = SourceLimits(max_bytes=1 << 20)
        world = World(tmp_path, Sources(roots=[tmp_path / "räume"], staging=tmp_path / "s", limits=limits), cleanup)
        world.good("good")
        healthy(world.secret, TINY_BASE, seed=2)
        cleanup.callback(world.sources.close)
        yield world


Escape = Callable[[World], str]
"""Prepares the disk, and returns the source that tries to get out."""

ESCAPES: dict[str, Escape] = {}


def escape(make: Escape) -> Escape:
    ESCAPES[make.__name__] = make
    return make


# Spellings of "one up", each as a path and as a URL.

UPS = (
    "..", "../", "./..", ".//..", "..//", "good/../..", "good/./../..", "../räume/..", "../../x/../..", "..\\",
    "..\\..",
    "%2e%2e", "%2E%2E", ".%2e", "%2e.", "%2e%2e%2f", "%252e%252e", "%25252e%25252e", "%c0%ae%c0%ae", "%uff0e%uff0e",
    "%e0%80%ae%e0%80%ae", "．．", "‥", "…", "․․", "。。", "..\u200b", "\u200b..", "\u202e..", "..\u0301", ".. ", " ..",
    "..%20", "...", "....", "....//", "..;", "..;/", "..\t", "..\n", "..\r\n", "..\x7f", "..\x1b", "..\x00", "..%00",
    "..%00/..", "..%2f", "..%5c", "..%c0%af", "..\ud800", "..\ufeff", "~", "~root", "$HOME/..", "${PWD}/..", "`pwd`/..",
    "*", "?", "[.][.]", "{..,x}", "..:", "..::$DATA", "good.", "good ", "good./..", "good%20/..", "good\\..\\..",
)  # fmt: skip


def _add_ups() -> None:
    for number, up in enumerate(UPS):
        ESCAPES[f"up_{number}"] = lambda world, up=up: f"{world.root}/{up}/secret"  # type: ignore[misc]
        ESCAPES[f"up_url_{number}"] = lambda world, up=up: f"file://{world.root}/{up}/secret"  # type: ignore[misc]


_add_ups()

TEXTS = (
    "{secret}", "/{secret}", "//{secret}", "{secret}/", "{secret}/.", "{secret}/./.", "{secret}/../secret",
    "{root}/../secret",
    "{place}", "{place}/", "/", "//", ".", "..", "../secret", "secret", "./secret", "räume/../secret", "~/secret",
    "/proc/self/root{secret}", "/proc/1/root{secret}", "/proc/thread-self/root{secret}", "/proc/self/cwd/secret",
    "/proc/self/cwd", "/dev/stdin", "/dev/fd/0", "{root}/good/../../secret", "{root}{secret}", "{root}\x00{secret}",
    "{secret}\x00{root}", "\x00{secret}", "{root}/\x00/../secret", "{root}-private", "{root}x/../secret",
    "{place}/RÄUME/good",
    "{place}/ra\u0308ume/good", "{place}/raume", "{root}/" + "x" * 300, "{root}/" + "x/" * 1500,
    "{root}/" + "../" * 900 + "etc",
    "{root}/" + "x" * 5000, "x" * 70000, "file://{secret}", "file:{secret}", "FILE://{secret}", "fIlE:///{secret}",
    "file://localhost{secret}", "file://LOCALHOST{secret}", "file:///{secret}", "file:////{secret}",
    "file://evil{secret}",
    "file://127.0.0.1{secret}", "file://[::1]{secret}", "file://localhost:80{secret}", "file://localhost@evil{secret}",
    "file://evil@localhost{secret}", "file://localhost.evil{secret}", "file://.{secret}", "file://..{secret}",
    "file://%2e%2e/secret", "file://%00{secret}", "file:secret", "file:../secret", "file://{root}%00/../secret",
    "file://{root}%2f..%2fsecret", "file://{root}/..%2fsecret", "file://{root}/good?/../../secret",
    "file://{root}/good#/x",
    "file:\\\\{secret}", "file:///%2fsecret", "file", "file:", "file:/", "file://", "file:///", "url:file://{secret}",
    "jar:file://{secret}", "netdoc:{secret}", "\\\\?\\{secret}", "C:\\secret", "\\\\host\\share", "dict://x{secret}",
    "upload:../secret", "upload:{secret}", "upload:" + "0" * 64, "upload:", "\ud800{secret}", "{root}/\udc80/../secret",
)  # fmt: skip


def _add_texts() -> None:
    for number, text in enumerate(TEXTS):
        ESCAPES[f"text_{number}"] = lambda world, text=text: text.format(  # type: ignore[misc]
            root=world.root, secret=world.secret, place=world.place
        )


_add_texts()


# Links in the place of folders.

LINK_TARGETS = {
    "absolute": "{secret}",
    "relative": "../secret",
    "through_itself": "../räume/../secret",
    "double_slash": "/{secret}",
    "proc_root": "/proc/self/root{secret}",
    "proc_cwd": "/proc/self/cwd",
    "proc_fd": "/proc/self/fd/{fd}",
    "dev_fd": "/dev/fd/{fd}",
    "many_up": "../" * 40 + "{secret}",
    "itself": "link",
    "nowhere": "nowhere",
}


def _add_folder_links() -> None:
    def last(world: World, target: str) -> str:
        (world.root / "link").symlink_to(_target(world, target))
        return f"{world.root}/link"

    def middle(world: World, target: str) -> str:
        (world.root / "link").symlink_to(_target(world, target) + "/..")
        return f"{world.root}/link/secret"

    def deep(world: World, target: str) -> str:
        (world.root / "a" / "b").mkdir(parents=True)
        inner = _target(world, target)
        (world.root / "a" / "b" / "link").symlink_to(inner if inner.startswith("/") else f"../../{inner}")
        return f"{world.root}/a/b/link"

    def chained(world: World, target: str) -> str:
        (world.root / "link").symlink_to(_target(world, target))
        (world.root / "chain").symlink_to("link")
        (world.root / "longer").symlink_to("./chain/.")
        return f"file://{world.root}/longer"

    for form in (last, middle, deep, chained):
        for name, target in LINK_TARGETS.items():
            ESCAPES[f"folder_link_{form.__name__}_{name}"] = (
                lambda world, form=form, target=target: form(world, target)  # type: ignore[misc]
            )


def _target(world: World, target: str) -> str:
    return target.format(secret=world.secret, fd=world.held_open(world.secret))


_add_folder_links()


@escape
def link_to_the_parent(world: World) -> str:
    (world.root / "up").symlink_to("..")
    return f"{world.root}/up/secret"


@escape
def link_to_the_top(world: World) -> str:
    (world.root / "top").symlink_to("/")
    return f"{world.root}/top{world.secret}"


@escape
def links_past_the_limit(world: World) -> str:
    for number in range(60):
        (world.root / f"l{number}").symlink_to(f"l{number + 1}" if number < 59 else "good")
    return f"{world.root}/l0"


# Files that are no files of the folder.


def _add_file_cases() -> None:
    def swapped(world: World, name: str, put: Callable[[World, Path, str], object]) -> str:
        folder = world.good("adapter")
        (folder / name).unlink()
        put(world, folder / name, name)
        return str(folder)

    puts: dict[str, Callable[[World, Path, str], object]] = {
        "link": lambda world, path, name: path.symlink_to(world.secret / name),
        "relative_link": lambda world, path, name: path.symlink_to(f"../../secret/{name}"),
        "link_through_root": lambda world, path, name: path.symlink_to(f"/proc/self/root{world.secret}/{name}"),
        "magic_link": lambda world, path, name: path.symlink_to(
            f"/proc/self/fd/{world.held_open(world.secret / name)}"
        ),
        "link_to_a_neighbour": lambda world, path, name: path.symlink_to(f"../good/{name}"),
        "link_to_itself": lambda world, path, name: path.symlink_to(name),
        "link_to_the_folder": lambda world, path, name: path.symlink_to("."),
        "link_to_nothing": lambda world, path, name: path.symlink_to("nothing"),
        "hard_link": lambda world, path, name: os.link(world.secret / name, path),
        "fifo": lambda world, path, name: os.mkfifo(path),
        "socket": lambda world, path, name: _socket(world, path),
        "device": lambda world, path, name: path.symlink_to("/dev/zero"),
        "folder": lambda world, path, name: path.mkdir(),
        "stdin": lambda world, path, name: path.symlink_to("/dev/stdin"),
        "environment": lambda world, path, name: path.symlink_to("/proc/self/environ"),
    }
    for kind, put in puts.items():
        for name in FILES:
            ESCAPES[f"{kind}_as_{name.partition('.')[0]}"] = (
                lambda world, name=name, put=put: swapped(world, name, put)  # type: ignore[misc]
            )


def _socket(world: World, path: Path) -> None:
    bound = socket.socket(socket.AF_UNIX)
    world.cleanup.callback(bound.close)
    folder = world.held_open(path.parent)
    bound.bind(f"/proc/self/fd/{folder}/{path.name}")  # the path itself may be too long for a socket


_add_file_cases()


def _hub_cache(world: World) -> tuple[Path, Path]:
    """(repo, snapshot) with the files of an adapter in blobs."""
    repo = world.root / "models--org--repo"
    snapshot = world.good("models--org--repo/snapshots/abc")
    (repo / "blobs").mkdir()
    for name in FILES:
        (snapshot / name).rename(repo / "blobs" / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    return repo, snapshot


@escape
def hub_blob_that_leads_out(world: World) -> str:
    repo, snapshot = _hub_cache(world)
    (repo / "blobs" / WEIGHTS).unlink()
    (repo / "blobs" / WEIGHTS).symlink_to(world.secret / WEIGHTS)
    return str(snapshot)


@escape
def hub_blobs_that_are_a_link(world: World) -> str:
    repo, snapshot = _hub_cache(world)
    shutil.rmtree(repo / "blobs")
    (repo / "blobs").symlink_to(world.secret)
    return str(snapshot)


@escape
def hub_blob_of_another_repo(world: World) -> str:
    repo, snapshot = _hub_cache(world)
    shutil.copytree(world.secret, world.root / "models--org--private" / "blobs")
    (repo / "blobs" / WEIGHTS).unlink()
    (repo / "blobs" / WEIGHTS).symlink_to(f"../../models--org--private/blobs/{WEIGHTS}")
    return str(snapshot)


@escape
def shared_blobs_that_are_a_link(world: World) -> str:
    repo, snapshot = _hub_cache(world)
    (world.secret / ".huggingface-shared-blobs").write_text("1\n")
    (world.root / "blobs").symlink_to(world.secret)
    (repo / "blobs" / WEIGHTS).unlink()
    (repo / "blobs" / WEIGHTS).symlink_to(f"../../blobs/{WEIGHTS}")
    return str(snapshot)


@escape
def a_shard_that_leads_out(world: World) -> str:
    folder = world.good("adapter")
    (folder / WEIGHTS).rename(folder / "shard.safetensors")
    (folder / "shard.safetensors").unlink()
    (folder / "shard.safetensors").symlink_to(world.secret / WEIGHTS)
    (folder / "adapter_model.safetensors.index.json").write_text('{"weight_map": {"x": "shard.safetensors"}}')
    return str(folder)


@escape
def a_shard_by_its_path(world: World) -> str:
    folder = world.good("adapter")
    (folder / WEIGHTS).unlink()
    index = f'{{"weight_map": {{"x": "../../secret/{WEIGHTS}"}}}}'
    (folder / "adapter_model.safetensors.index.json").write_text(index)
    return str(folder)


def test_there_are_enough_escapes() -> None:
    assert len(ESCAPES) >= 250


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ESCAPES)
async def test_nothing_outside_of_the_roots_is_opened(name: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(world.secret, f"{world.root}-private")
    shutil.copytree(world.secret, world.place / "ra\u0308ume" / "good")  # normal form D: another folder
    monkeypatch.chdir(world.place)
    source = ESCAPES[name](world)
    outside = [world.secret, Path(f"{world.root}-private"), world.place / "ra\u0308ume" / "good"]
    with watched(*outside) as opens:
        with pytest.raises(AdapterError) as caught:
            await world.load(source)
        assert opens.seen() == []
    assert 400 <= caught.value.status < 500
    assert caught.value.code in {
        "adapter_source_not_allowed", "adapter_source_invalid", "adapter_source_unsupported", "adapter_not_found",
        "adapter_corrupt",
    }  # fmt: skip
    assert all(" " <= c <= "~" or c == "…" for c in str(caught.value)), "a message is plain ASCII"


@pytest.mark.asyncio
async def test_the_secret_would_load_and_would_be_seen(world: World) -> None:
    """Else the tests above could not fail."""
    anywhere = Sources(staging=world.place / "s", limits=SourceLimits(max_bytes=1 << 20))
    with watched(world.secret) as opens:
        async with anywhere.fetched(str(world.secret)) as folder:
            assert version_in(folder) != await world.load(str(world.root / "good"))
        assert {"", *FILES} <= set(opens.seen())
    anywhere.close()


@pytest.mark.asyncio
async def test_what_lies_below_a_root_loads_however_it_is_spelled(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = version_in(world.root / "good")
    (world.root / "current").symlink_to("good")
    (world.root / "absolute").symlink_to(world.root / "good")
    (world.root / "deep" / "er").mkdir(parents=True)
    (world.root / "deep" / "er" / "link").symlink_to("../../current")
    monkeypatch.chdir(world.place)
    root = world.root
    for source in (
        f"{root}/good", f"{root}//good/", f"{root}/./good/.", "räume/good", f"file://{root}/good", f"{root}/current",
        f"file://localhost{root}/good", f"file://{world.place}/r%C3%A4ume/good", f"{root}/absolute",
        f"{root}/deep/er/link",
    ):  # fmt: skip
        assert await world.load(source) == wanted, source


@pytest.mark.asyncio
async def test_a_root_that_is_a_link_is_known_by_both_names(world: World) -> None:
    (world.place / "alias").symlink_to(world.root)
    sources = Sources(roots=[world.place / "alias"], staging=world.place / "s", limits=SourceLimits(max_bytes=1 << 20))
    for root in (world.place / "alias", world.root):
        async with sources.fetched(str(root / "good")) as folder:
            assert version_in(folder) == version_in(world.root / "good")
    with pytest.raises(AdapterSourceNotAllowed):
        sources.check(str(world.secret))
    sources.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("is_rooted", [True, False])
async def test_the_hubs_cache_layouts(world: World, is_rooted: bool) -> None:
    """Its links to blobs, and those of newer versions from there to blobs that repos share."""
    repo, snapshot = _hub_cache(world)
    wanted = version_in(world.root / "good")
    roots = [world.root] if is_rooted else []
    sources = Sources(roots=roots, staging=world.place / "s", limits=SourceLimits(max_bytes=1 << 20))
    async with sources.fetched(str(snapshot)) as folder:
        assert version_in(folder) == wanted
    (world.root / "blobs" / "ab").mkdir(parents=True)
    (world.root / "blobs" / ".huggingface-shared-blobs").write_text("1\n")
    (repo / "blobs" / WEIGHTS).rename(world.root / "blobs" / "ab" / "abcd")
    (repo / "blobs" / WEIGHTS).symlink_to("../../blobs/ab/abcd")
    async with sources.fetched(str(snapshot)) as folder:
        assert version_in(folder) == wanted
    (world.root / "blobs" / ".huggingface-shared-blobs").unlink()
    with pytest.raises(AdapterError, match="leads out"):
        async with sources.fetched(str(snapshot)) as folder:
            version_in(folder)
    sources.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("what", ["folder", "parent", "weights"])
async def test_a_link_swapped_in_during_loads_is_never_followed_outside(what: str, world: World) -> None:
    world.good("a/b")
    swapped = {"folder": "a/b", "parent": "a", "weights": f"a/b/{WEIGHTS}"}[what]
    outside = {"folder": world.secret, "parent": world.place / "outer", "weights": world.secret / WEIGHTS}[what]
    shutil.copytree(world.secret, world.place / "outer" / "b")
    good = version_in(world.root / "a" / "b")
    with swapping(world.root / swapped, outside):
        loaded = await _outcomes(lambda: world.load(str(world.root / "a" / "b")), until=40)
    assert set(loaded) == {good, None}, "another version was loaded, or the swap was not seen at all"


@pytest.mark.asyncio
async def test_a_folder_replaced_during_loads_is_one_or_the_other(world: World) -> None:
    """Config of one and weights of the other would be an adapter that nobody made; their ranks differ here."""
    healthy(world.root / "a", TINY_BASE, seed=3, r=4)
    other = healthy(world.place / "other", TINY_BASE, seed=4, r=8)
    both = {version_in(world.root / "a"), version_in(other)}
    with swapping(world.root / "a", other, as_link=False):
        loaded = await _outcomes(lambda: world.load(str(world.root / "a")), until=40, errors=(AdapterNotFound,))
    assert both <= set(loaded) <= {*both, None}


async def _outcomes(
    load: Callable[[], Awaitable[AdapterVersion]],
    *,
    until: int,
    errors: tuple[type[AdapterError], ...] = (AdapterError,),
) -> list[AdapterVersion | None]:
    """Versions, None for an error, until each outcome came often enough, or for 4000 loads."""
    outcomes: list[AdapterVersion | None] = []
    for _ in range(4000):
        try:
            outcomes.append(await load())
        except errors:
            outcomes.append(None)
        counts = [outcomes.count(outcome) for outcome in set(outcomes)]
        if len(counts) > 1 and min(counts) >= until:
            break
    return outcomes


class swapping:
    """A thread that puts `other`, or a link to it, in the place of `path` and takes it away again."""

    def __init__(self, path: Path, other: Path, *, as_link: bool = True) -> None:
        self._path, self._other = path, other
        if as_link:
            self._other = path.with_name("swap-link")
            self._other.symlink_to(other)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._swap)

    def _swap(self) -> None:
        hold = self._path.with_name("swap-hold")
        while not self._stop.is_set():
            os.rename(self._path, hold)
            os.rename(self._other, self._path)
            self._stop.wait(0.0005)
            os.rename(self._path, self._other)
            os.rename(hold, self._path)
            self._stop.wait(0.0005)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
