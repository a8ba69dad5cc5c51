"""A host tier between a fake disk, a fake engine and clients, each of which watches that nobody breaks its rules."""

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable
from typing import Any

import torch

from adapters.adapter_ref import AdapterVersion
from adapters.host_cache import HostCache
from adapters.lora_model import LoRAModel, LoRAWeights
from server.errors import ServerError
from server.lifecycle.ensure_all import EnsureAll
from server.lifecycle.host_tier import HostTier

STEP = 0.02  # seconds: what is put in the engine's inbox is done so much later
READ = 0.01  # seconds a read takes


def version_of(name: str) -> AdapterVersion:
    return AdapterVersion(name)


def model_of(version: AdapterVersion, num_bytes: int) -> LoRAModel:
    a, b = torch.zeros(1, num_bytes - 1, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.uint8)
    return LoRAModel(version, {"q_proj": LoRAWeights(a, b)})


class Engine:
    """A real host cache behind an inbox: messages take their place when called and are done in order, a step later."""

    def __init__(self, world: "World", max_bytes: int, max_adapters: int | None) -> None:
        self.host = HostCache(max_bytes, max_adapters)
        self.asked: list[tuple[str, AdapterVersion]] = []  # in the order of calls
        self.dead: ServerError | None = None
        self.refuse: Exception | None = None
        self._world = world
        self._inbox: deque[tuple[Any, asyncio.Future[None]]] = deque()

    def load_adapter(self, model: LoRAModel) -> Awaitable[None]:
        return self._ask("load", model.version, lambda: self._load(model))

    def unload_adapter(self, version: AdapterVersion) -> Awaitable[None]:
        assert not self._world.using[version], "unloaded while a request uses it"
        return self._ask("unload", version, lambda: self._unload(version))

    def _ask(self, what: str, version: AdapterVersion, act: Any) -> Awaitable[None]:
        if self.dead is not None:
            raise self.dead
        self.asked.append((what, version))
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        self._inbox.append((act, done))
        loop.call_later(STEP, self._handle)
        return done

    def _handle(self) -> None:
        act, done = self._inbox.popleft()
        try:
            act()
        except Exception as error:
            if not done.done():
                done.set_exception(error)
        else:
            if not done.done():
                done.set_result(None)

    def _load(self, model: LoRAModel) -> None:
        self._world.reading.pop(model.version, None)
        if self.refuse is not None:
            raise self.refuse
        assert model.version not in self.host, "loaded twice"
        self.host.put(model)
        self._world.check_memory()

    def _unload(self, version: AdapterVersion) -> None:
        assert not self._world.using[version], "unloaded while a request uses it"
        assert self.host.drop(version), "unloaded what is not there"


class World:
    """`sizes` are the bytes of each version on disk. A client takes a lease, asks, uses, and gives back."""

    def __init__(self, sizes: dict[str, int], max_bytes: int, max_adapters: int | None = None, **options: Any) -> None:
        self.sizes = {version_of(name): size for name, size in sizes.items()}
        self.engine = Engine(self, max_bytes, max_adapters)
        self.leases: Counter[AdapterVersion] = Counter()
        self.using: Counter[AdapterVersion] = Counter()
        self.declared: dict[AdapterVersion, int] = {}  # bytes a client believes in, where they are others
        self.reads: list[AdapterVersion] = []
        self.reading: dict[AdapterVersion, int] = {}  # bytes read or being read that the engine does not have yet
        self.read_seconds: dict[AdapterVersion, float] = {}
        self.broken: dict[AdapterVersion, Exception] = {}
        self.changes: list[AdapterVersion] = []
        self.tier = HostTier(
            self.engine,
            self._read,
            num_leases=self.leases.__getitem__,
            max_bytes=max_bytes,
            max_adapters=max_adapters,
            on_change=self.changes.append,
            **options,
        )
        self.together = EnsureAll(self.tier)

    async def _read(self, version: AdapterVersion) -> LoRAModel:
        self.reads.append(version)
        self.reading[version] = self.sizes[version]
        self.check_memory()
        try:
            await asyncio.sleep(self.read_seconds.get(version, READ))
            if version in self.broken:
                raise self.broken[version]
        except BaseException:
            del self.reading[version]
            raise
        return model_of(version, self.sizes[version])

    def check_memory(self) -> None:
        """What is there in truth, whatever the tier's books say."""
        assert self.engine.host.num_bytes + sum(self.reading.values()) <= self.engine.host.max_bytes
        limit = self.engine.host.max_adapters
        assert limit is None or len(self.engine.host) + len(self.reading) <= limit

    def check(self) -> None:
        self.tier.check_integrity()
        self.engine.host.check_integrity()
        self.check_memory()
        assert all(version in self.engine.host for version in self.using if self.using[version])

    @property
    def residents(self) -> str:
        """Names of one letter, in order."""
        return "".join(sorted(name for name in self.sizes if name in self.tier))

    async def ask(self, name: str, *, timeout: float = 100.0) -> AdapterVersion:
        """Lease and ensure; the lease is the caller's when this returns."""
        version = version_of(name)
        self.leases[version] += 1
        try:
            num_bytes = self.declared.get(version, self.sizes[version])
            await self.tier.ensure(version, num_bytes, timeout=timeout)
            assert version in self.engine.host, "promised and not there"
        except BaseException:
            self.give_back(version)
            raise
        self.using[version] += 1
        return version

    async def ask_all(self, names: str, *, timeout: float = 100.0) -> None:
        """As `ask`, of several names of one letter for one request."""
        versions = [version_of(name) for name in names]
        self.leases.update(versions)
        try:
            await self.together.ensure({version: self.sizes[version] for version in versions}, timeout)
            assert all(version in self.engine.host for version in versions), "promised and not there together"
        except BaseException:
            for version in versions:
                self.give_back(version)
            raise
        self.using.update(versions)

    def done_all(self, names: str) -> None:
        for name in names:
            self.done(name)

    def done(self, name: str) -> None:
        """A request that `ask` let in has ended."""
        self.using[version_of(name)] -= 1
        self.give_back(version_of(name))

    def give_back(self, version: AdapterVersion) -> None:
        self.leases[version] -= 1
        self.tier.released(version)
        self.check()

    async def request(self, name: str, seconds: float = 0.0, *, timeout: float = 100.0) -> None:
        await self.ask(name, timeout=timeout)
        try:
            await asyncio.sleep(seconds)
        finally:
            self.done(name)

    async def settle(self) -> None:
        """Long enough for messages and reads under way."""
        await asyncio.sleep(10 * (STEP + READ))
        self.check()
