"""An AdapterControl in memory: it keeps records as the real one does, fails on request, and says what it was asked."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

from adapters.errors import AdapterNotFound
from server.lifecycle.catalogue_records import AliasTarget
from server.lifecycle.control import WantedAdapter


class FakeControl:
    """`faults` is name → what to raise when it is applied; `gates` name → what an apply waits for first."""

    def __init__(self) -> None:
        self.records: dict[str, WantedAdapter] = {}
        self.aliases: dict[str, tuple[str, tuple[AliasTarget, ...]]] = {}
        self.calls: list[tuple[str, str]] = []
        self.faults: dict[str, Exception] = {}
        self.gates: dict[str, asyncio.Event] = {}

    async def apply(self, wanted: WantedAdapter) -> None:
        self.calls.append(("apply", wanted.name))
        if (gate := self.gates.get(wanted.name)) is not None:
            await gate.wait()
        await asyncio.sleep(0)
        if (fault := self.faults.get(wanted.name)) is not None:
            raise fault
        self.records[wanted.name] = wanted

    async def remove(self, name: str) -> None:
        self.calls.append(("remove", name))
        await asyncio.sleep(0)
        if self.records.pop(name, None) is None:
            raise AdapterNotFound(f"no adapter is registered as {name!r}")

    def managed(self, owner: str) -> Mapping[str, WantedAdapter]:
        return {name: wanted for name, wanted in self.records.items() if wanted.managed_by == owner}

    def wanted(self, name: str) -> WantedAdapter | None:
        return self.records.get(name)

    def owner_of(self, name: str) -> str | None:
        if name in self.records:
            return self.records[name].managed_by
        return self.aliases[name][0] if name in self.aliases else None

    async def put_alias(self, name: str, targets: Sequence[AliasTarget], *, managed_by: str = "api") -> None:
        self.calls.append(("put_alias", name))
        await asyncio.sleep(0)
        for target in targets:
            if target.adapter not in self.records:
                raise AdapterNotFound(f"no adapter is registered as {target.adapter!r}")
        self.aliases[name] = (managed_by, tuple(targets))

    async def remove_alias(self, name: str) -> None:
        self.calls.append(("remove_alias", name))
        await asyncio.sleep(0)
        if self.aliases.pop(name, None) is None:
            raise AdapterNotFound(f"no alias is registered as {name!r}")

    def aliases_managed(self, owner: str) -> Mapping[str, Sequence[AliasTarget]]:
        return {name: targets for name, (by, targets) in self.aliases.items() if by == owner}

    # For the tests.

    def own(self, name: str, owner: str, source: str = "/x") -> None:
        """As if `owner` had loaded it before."""
        self.records[name] = WantedAdapter(name=name, source=source, managed_by=owner)

    def times(self, call: str, name: str) -> int:
        return self.calls.count((call, name))

    def pin(self, name: str) -> None:
        self.records[name] = replace(self.records[name], pin=True)


async def until(condition: Callable[[], bool], *, seconds: float = 60.0) -> None:
    """Generous: the machine may be busy. What must be fast is measured where it matters."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about in time"
        await asyncio.sleep(0.01)


@asynccontextmanager
async def running(reconciler):  # type: ignore[no-untyped-def]
    """`reconciler.run()` as a task; its own failure fails the test."""
    task = asyncio.create_task(reconciler.run())
    try:
        yield task
        assert not task.done(), task.exception()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
