"""The churn: clients decode greedily while adapters are loaded, replaced, deleted, aliased and pushed out under them.

First a quiet run on the same server says what each version answers to each prompt. Then every reply must be, token for
token, what the version in its header answers, and that version must be one its name stood for. Nothing may be lost, and
nothing may be left behind. Speaks HTTP only. What a server does with adapters it does not tell is not seen here.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from loadtest.churn_client import Question, ask
from loadtest.churn_names import NameBook
from loadtest.churn_operator import KINDS, Operator
from loadtest.churn_oracle import Oracle, quiet_run
from loadtest.churn_rest import Watch, faults_at_rest, faults_when_cleared
from loadtest.churn_verdict import Verdict
from loadtest.client import LoadTestFailed, check_loopback
from loadtest.workload import Workload

_REPLY_SECONDS = 1800


@dataclass(frozen=True, slots=True, kw_only=True)
class ChurnSettings:
    """`num_sources` is how many sets of bytes there are for the names; rooms are the server's, None = not looked at."""

    num_tokens: int = 200_000
    num_clients: int = 16
    num_adapters: int = 12
    num_sources: int = 16
    num_prompts: int = 6
    min_tokens: int = 16  # of a reply
    max_tokens: int = 64
    interval: float = 0.03  # seconds from one operation to the next
    kinds: tuple[str, ...] = KINDS
    device_room: int = 4  # adapters
    host_room: int | None = 6  # adapters
    seed: int = 0


@dataclass(frozen=True, slots=True)
class ChurnResult:
    verdict: Verdict
    operations: Counter[str]
    missed: int
    watch: Watch
    faults: tuple[str, ...]  # of whatever is not a reply
    seconds: float

    @property
    def is_clean(self) -> bool:
        verdict = self.verdict
        return not (verdict.wrong_tokens or verdict.wrong_versions or verdict.lost or self.faults)

    def __str__(self) -> str:
        verdict = self.verdict
        operations = ", ".join(f"{count} {kind}" for kind, count in sorted(self.operations.items()))
        rows = {
            "output tokens checked": f"{verdict.tokens} in {self.seconds:.0f} s",
            "whole replies": verdict.replies,
            "404 for a deleted name": verdict.not_found,
            "ended by an aborting delete": verdict.aborted,
            "operations": f"{operations}; {self.missed} moments missed",
            "the server's own counters": self.watch,
            "**wrong-adapter tokens**": verdict.wrong_tokens,
            "**replies of a version the name did not stand for**": verdict.wrong_versions,
            "**requests lost**": verdict.lost,
            "**integrity faults**": len(self.faults),
        }
        table = "\n".join(["| churn | |", "|---|---:|", *(f"| {name} | {value} |" for name, value in rows.items())])
        return "\n".join([table, *(f"- {each}" for each in (*verdict.examples, *self.faults))])


async def churn(url: str, base: str, folders: Sequence[Path], settings: ChurnSettings) -> ChurnResult:
    """The whole of it against a running server without other load, whose base model is `base`."""
    check_loopback(url)
    prompts = [call.prompt for call in Workload(models=(base,), num_requests=settings.num_prompts).calls()]
    session = aiohttp.ClientSession(
        url, connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=_REPLY_SECONDS)
    )
    async with session:
        oracle = await quiet_run(session, base, folders, _short(prompts), settings.max_tokens)
        print(f"The quiet run is done: {len(oracle.tokens)} answers of {settings.max_tokens} tokens", flush=True)
        return await _Churn(session, base, oracle, settings).run()


def _short(prompts: Sequence[str]) -> list[str]:
    """Two dozen words each; every second begins as the one before, so that there are prefixes to be found again."""
    words = [prompt.split()[:24] for prompt in prompts]
    return [" ".join(words[i] if i % 2 == 0 else words[i - 1][:20] + words[i][20:]) for i in range(len(words))]


class _Churn:
    """One run, from the first load to the last delete."""

    def __init__(self, session: aiohttp.ClientSession, base: str, oracle: Oracle, settings: ChurnSettings) -> None:
        self._session, self._base, self._oracle, self._settings = session, base, oracle, settings
        self._book = NameBook(time.monotonic)
        self._verdict = Verdict()
        self._random = random.Random(settings.seed + 1)
        self._operator = Operator(
            session,
            self._book,
            oracle.sources,
            self._squeeze,
            settings.num_adapters,
            kinds=settings.kinds,
            seed=settings.seed,
        )

    async def run(self) -> ChurnResult:
        await self._operator.populate()
        watch = await Watch.begin(self._session)
        began, stop = time.monotonic(), asyncio.Event()
        async with asyncio.TaskGroup() as group:
            operating = group.create_task(self._operator.churn(self._settings.interval, stop))
            watching = group.create_task(watch.follow(stop))
            async with asyncio.TaskGroup() as clients:
                for _ in range(self._settings.num_clients):
                    clients.create_task(self._client())
            stop.set()
            await asyncio.gather(operating, watching)
        seconds = time.monotonic() - began
        faults = [*self._operator.refused, *await self._rest(watch)]
        return ChurnResult(self._verdict, self._operator.done, self._operator.missed, watch, tuple(faults), seconds)

    async def _client(self) -> None:
        while self._verdict.tokens < self._settings.num_tokens:
            settings = self._settings
            num_tokens = self._random.randint(settings.min_tokens, settings.max_tokens)
            await self._put(self._question(self._model(), num_tokens))
            if self._verdict.lost > self._settings.num_clients:
                raise LoadTestFailed(f"{self._verdict.lost} requests were lost; {'; '.join(self._verdict.examples)}")

    def _model(self) -> str:
        """Mostly an adapter by name or alias; now and then the base, or a name that is gone or about to be."""
        draw = self._random.random()
        if draw < 0.06:
            return self._base
        if draw < 0.2 and self._book.aliases:
            return self._random.choice(self._book.aliases)
        if draw < 0.24 and (self._book.absent or self._book.busy):
            return self._random.choice([*self._book.absent, *self._book.busy])
        return self._random.choice(self._book.present or [self._base])

    def _question(self, model: str, max_tokens: int) -> Question:
        prompt = self._random.randrange(len(self._oracle.prompts))
        return Question(model, prompt, self._oracle.prompts[prompt], max_tokens, self._random.random() < 0.5)

    async def _put(self, question: Question) -> None:
        answer = await ask(self._session, question)
        self._verdict.judge(answer, self._book, self._oracle, self._base)

    async def _squeeze(self, names: Sequence[str]) -> None:
        await asyncio.gather(*(self._put(self._question(name, 1)) for name in names))

    async def _rest(self, watch: Watch) -> list[str]:
        """What is amiss once nobody asks: then every name is asked once more, and all are taken away."""
        settings = self._settings
        faults = await faults_at_rest(self._session)
        faults += watch.faults(
            device_room=settings.device_room, host_room=settings.host_room, num_adapters=settings.num_adapters
        )
        faults += [f"no {kind} ever succeeded" for kind in settings.kinds if not self._operator.done[kind]]
        for name in self._book.present:
            await self._put(self._question(name, settings.min_tokens))
        await self._operator.clear()
        return faults + await faults_when_cleared(self._session)
