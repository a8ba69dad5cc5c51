"""A process of the restart proof: serves a state folder, tells how it stands, and changes it at random until killed.

Each client changes names of its own, one change after the other, and tells of each before it is asked for and when it
is acknowledged; versions are common to all. A change's number is in the record it makes, so half of one would show.
"""

import asyncio
import random
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from adapters.lora_model import LoRAModel
from adapters.version_store import VersionStore
from server.lifecycle.catalogue_records import AliasTarget
from server.lifecycle.control import WantedAdapter
from server.lifecycle.directory import AdapterDirectory
from server.lifecycle.pending_load import parse_pending
from tests.adapters.version_samples import assert_same
from tests.server.lifecycle.restart_world import World, adapter_folder, model_in, serving
from tests.server.lifecycle.test_sources_uploads import TYPE, body_of, part, pieces

NUM_CLIENTS = 3
NUM_SEEDS = 5  # adapters there are to load
FIXED = "fixed"  # loaded first and never changed; what aliases lead to


@dataclass(frozen=True)
class Move:
    """`load` is told of when it is done, `submit` when it was accepted."""

    action: str  # load | submit | settings | delete | alias | unalias
    name: str
    number: int
    seed: int = 0


@dataclass(frozen=True)
class Standing:
    """What a name is: an adapter by its version's seed, the number of what made it and of a load under way."""

    kind: str
    number: int
    seed: int | None = None
    pending: int | None = None


def serve_until_killed(state: Path, sources: Path, seed: int, told: Connection, plant: str) -> None:
    PLANTS[plant]()
    asyncio.run(_serve(state, sources, seed, told))


async def _serve(state: Path, sources: Path, seed: int, told: Connection) -> None:
    async with serving(state) as world:
        told.send(("stands", standing_in(world, sources)))
        await world.settled()
        for version in world.store.versions():  # what the sweep does after a minute
            world.service.keeper.review(version)
        await world.service.keeper.settle()
        check_weights(world, sources)
        world.check_integrity()
        told.send(("settled", standing_in(world, sources)))
        if FIXED not in world.service.registry:
            await world.service.load(FIXED, adapter_folder(sources, 0))
        clients = [_Client(number, world, sources, seed, told).run() for number in range(NUM_CLIENTS)]
        await asyncio.gather(*clients)


class _Client:
    def __init__(self, number: int, world: World, sources: Path, seed: int, told: Connection) -> None:
        self._number = number
        self._world = world
        self._sources = sources
        self._told = told
        self._choice = random.Random(f"{seed} {number}")
        self._count = seed * 1000 * NUM_CLIENTS + number * 1000

    async def run(self) -> None:
        while True:
            self._count += 1
            move = self._move(self._count)
            self._told.send(("tries", self._number, move))
            await self._apply(move)
            self._told.send(("done", self._number, move))
            if self._choice.random() < 0.5:
                await self._world.settled()

    def _move(self, number: int) -> Move:
        if self._choice.random() < 0.2:
            name = f"alias-{self._number}"
            is_there = name in self._world.service.directory.aliases
            return Move("unalias" if is_there and self._choice.random() < 0.3 else "alias", name, number)
        name = f"adapter-{self._number}-{self._choice.randrange(2)}"
        actions = ["load", "load", "submit"]
        if name in self._world.service.registry:
            actions += ["settings", "delete"]
        return Move(self._choice.choice(actions), name, number, self._choice.randrange(NUM_SEEDS))

    async def _apply(self, move: Move) -> None:
        service = self._world.service
        match move.action:
            case "load":
                await (await service.submit(await self._wanted(move))).wait()
            case "submit":
                await service.submit(await self._wanted(move))
            case "settings":
                await service.changes.change(move.name, priority=move.number)
            case "delete":
                await service.unload(move.name)
            case "alias":
                await service.put_alias(move.name, [AliasTarget(adapter=FIXED, weight=move.number)])
            case "unalias":
                await service.remove_alias(move.name)

    async def _wanted(self, move: Move) -> WantedAdapter:
        """Every other adapter is uploaded first."""
        source = adapter_folder(self._sources, move.seed)
        if move.seed % 2:
            body = body_of(*(part(path.name, path.read_bytes()) for path in Path(source).iterdir()))
            source = (await self._world.uploads.receive(TYPE, pieces(body, 1024))).source
        return WantedAdapter(name=move.name, source=source, priority=move.number)


def standing_in(world: World, sources: Path) -> dict[str, Standing]:
    seeds = {model_in(adapter_folder(sources, seed)).version: seed for seed in range(NUM_SEEDS)}
    names: dict[str, Standing] = {}
    for name, record in world.service.directory.records.items():
        assert record.failure is None, f"{name}: {record.failure}"
        pending = None if record.pending is None else parse_pending(record.pending).priority
        seed = None if record.version is None else seeds[record.version]
        names[name] = Standing("adapter", record.priority, seed, pending)
    for name, alias in world.service.directory.aliases.items():
        names[name] = Standing("alias", int(alias.targets[0].weight))
    return names


def check_weights(world: World, sources: Path) -> None:
    """What is registered is on this disk and has the weights of its source; nothing of a write is left over."""
    models = {model.version: model for seed in range(NUM_SEEDS) for model in [model_in(adapter_folder(sources, seed))]}
    records = world.service.directory.records.values()
    named = {version for record in records for version in record.named_versions}
    for version in named:
        assert_same(world.store.read(version), models[version])
    assert set(world.store.versions()) == named, "weights that no name leads to are not removed"
    left = [path for path in world.state.path.rglob("*") if path.name == ".writing"]
    assert not left, f"left over: {left}"
    for folder in (world.state.staging, world.state.uploads / "incoming"):
        litter = [path for path in folder.glob("*/*") if path.name != ".lock"]
        assert not litter, f"left over: {litter}"


def _acknowledge_early() -> None:
    """Plant: a deletion or an alias is answered before it is durable."""
    for name in ("delete", "put_alias"):
        setattr(AdapterDirectory, name, _later(getattr(AdapterDirectory, name)))


def _later(change: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[None]]:
    async def acknowledge(directory: AdapterDirectory, record: Any) -> None:
        async def work() -> None:
            await asyncio.sleep(0.03)
            await change(directory, record)

        _LATER.append(asyncio.create_task(work()))

    return acknowledge


_LATER: list[asyncio.Task[None]] = []


def _write_weights_late() -> None:
    """Plant: the record is durable before the weights are."""
    put = VersionStore.put

    def late(store: VersionStore, model: LoRAModel) -> int:
        threading.Thread(target=lambda: (time.sleep(0.05), put(store, model)), daemon=True).start()
        return 0

    VersionStore.put = late  # type: ignore[method-assign]


PLANTS: Mapping[str, Callable[[], None]] = {
    "": lambda: None,
    "acknowledge early": _acknowledge_early,
    "write weights late": _write_weights_late,
}
