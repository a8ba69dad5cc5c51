"""Whoever changes adapters during the churn: every so many milliseconds a load, replace, delete, alias move or squeeze.

A change is begun in the book before it is sent and ended when it is acknowledged. One name is changed by one operation
at a time; different names at once. Knows nothing of tokens.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import aiohttp

from loadtest.churn_names import NameBook
from loadtest.churn_oracle import Source, load
from loadtest.client import LoadTestFailed

LOAD, REPLACE, DELETE, ABORT, ALIAS, PRESSURE = "load", "replace", "delete", "abort", "alias", "pressure"
KINDS = (LOAD, REPLACE, DELETE, ABORT, ALIAS, PRESSURE)

_ALIASES = ("alias-a", "alias-b", "alias-c")
_MAX_AT_ONCE = 8
_DRAIN_SECONDS = 30


@dataclass(slots=True)
class Operator:
    """`squeeze(names)` asks each of them for a token at once, to push others out; `population` is how many names the
    loads and deletes keep around."""

    session: aiohttp.ClientSession
    book: NameBook
    sources: Sequence[Source]
    squeeze: Callable[[Sequence[str]], Awaitable[None]]
    population: int
    kinds: Sequence[str] = KINDS
    seed: int = 0
    done: Counter[str] = field(default_factory=Counter)
    refused: list[str] = field(default_factory=list)
    missed: int = 0  # moments at which too many operations were still under way
    _random: random.Random = field(init=False)
    _num_names: int = 0

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    async def populate(self) -> None:
        for source in self.sources[: self.population]:
            name = self._new_name()
            self.book.begin(name, source.version)
            self.book.end(name, await load(self.session, name, source.folder))

    async def churn(self, interval: float, stop: asyncio.Event) -> None:
        """Operate until `stop` is set, then wait for what is under way."""
        under_way: set[asyncio.Task[None]] = set()
        async with asyncio.TaskGroup() as group:
            while not stop.is_set():
                moment = time.monotonic()
                if len(under_way) < _MAX_AT_ONCE:
                    task = group.create_task(self._operate(self._random.choice(self.kinds)))
                    under_way.add(task)
                    task.add_done_callback(under_way.discard)
                else:
                    self.missed += 1
                await asyncio.sleep(max(0.0, moment + interval - time.monotonic()))

    async def clear(self) -> None:
        """Take every name and alias away."""
        for alias in self.book.aliases:
            async with self.session.delete(f"/v1/aliases/{alias}") as reply:
                await self._check(reply, f"deleting {alias}")
        for name in self.book.present:
            await self._delete(name, "drain")

    async def _operate(self, kind: str) -> None:
        present = self.book.present
        if kind in (LOAD, DELETE, ABORT):  # whatever was drawn, the population stays about the same
            kind = LOAD if len(present) < self.population - 2 else kind
            kind = DELETE if kind == LOAD and len(present) > self.population + 1 else kind
        if kind == LOAD:
            absent = self.book.absent
            is_known = bool(absent) and self._random.random() < 0.5
            await self._load(self._random.choice(absent) if is_known else self._new_name(), kind)
        elif len(present) > 2:
            await self._change(kind, present)

    async def _change(self, kind: str, present: list[str]) -> None:
        name = self._random.choice(present)
        if kind == REPLACE:
            await self._load(name, kind)
        elif kind in (DELETE, ABORT):
            await self._delete(name, "drain" if kind == DELETE else "abort")
        elif kind == ALIAS:
            await self._move_alias(self._random.sample(present, self._random.choice((1, 2))))
        else:
            await self.squeeze(self._random.sample(present, min(6, len(present))))
            self.done[PRESSURE] += 1

    def _new_name(self) -> str:
        self._num_names += 1
        return f"adapter-{self._num_names}"

    async def _load(self, name: str, kind: str) -> None:
        before = None if kind == LOAD else self.book.version(name)
        source = self._random.choice([each for each in self.sources if each.version != before])
        self.book.begin(name, source.version)
        try:
            version = await load(self.session, name, source.folder)
        except (LoadTestFailed, aiohttp.ClientError, TimeoutError) as error:
            self.refused.append(f"{kind}: {error}")
            version = before or ""
        self.done[kind] += version == source.version
        self.book.end(name, version or None)

    async def _delete(self, name: str, mode: str) -> None:
        before, is_aliased = self.book.version(name), name in self.book.aliased
        self.book.begin(name, None, aborts=mode == "abort")
        query = f"mode={mode}&deadline={_DRAIN_SECONDS}"
        async with self.session.delete(f"/v1/adapters/{name}?{query}") as reply:
            is_gone = reply.status in (200, 202)
            if not is_gone and not (reply.status == 409 and is_aliased):
                await self._check(reply, f"deleting {name}")
        self.done[DELETE if mode == "drain" else ABORT] += is_gone
        self.book.end(name, None if is_gone else before)

    async def _move_alias(self, targets: list[str]) -> None:
        alias = self._random.choice(_ALIASES)
        if alias in self.book.busy:
            return
        weights = (90, 10) if len(targets) == 2 else (1,)
        body = {"targets": [{"adapter": name, "weight": w} for name, w in zip(targets, weights, strict=True)]}
        self.book.begin_alias(alias, targets)
        async with self.session.put(f"/v1/aliases/{alias}", json=body) as reply:
            is_moved = reply.status in (200, 201)
            # A target may have been deleted since it was drawn; then the server may say so.
            if not is_moved and not (reply.status in (400, 404, 409) and self._may_be_gone(targets)):
                await self._check(reply, f"moving {alias} to {targets}")
        self.done[ALIAS] += is_moved
        self.book.end_alias(alias, targets if is_moved else None)

    def _may_be_gone(self, targets: Sequence[str]) -> bool:
        return any(name in self.book.busy or name in self.book.absent for name in targets)

    async def _check(self, reply: aiohttp.ClientResponse, what: str) -> None:
        if reply.status >= 400:
            self.refused.append(f"{what}: {reply.status} {(await reply.text())[:200]}")
