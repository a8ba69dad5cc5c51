"""The quiet run before the churn: what every version answers to every prompt when nobody else asks for anything.

Asked with `echo` and `logprobs`, for which a server computes the whole prompt: what an oracle says must not come out of
the cache that is on trial. Knows nothing of the churn.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from loadtest.churn_client import JSON, Question, ask
from loadtest.client import LoadTestFailed

_WHOLE_PROMPT = {"echo": True, "logprobs": 0}
_LOAD_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Source:
    """Bytes on disk and the version the server found them to be."""

    folder: Path
    version: str


@dataclass(frozen=True, slots=True)
class Oracle:
    """`tokens[version, prompt]`; version None is the base model."""

    prompts: tuple[str, ...]
    sources: tuple[Source, ...]
    max_tokens: int
    tokens: dict[tuple[str | None, int], list[int]] = field(default_factory=dict)

    def num_wrong(self, version: str | None, prompt: int, token_ids: Sequence[int]) -> int:
        """Tokens that are not the version's own at their place."""
        own = self.tokens.get((version, prompt))
        if own is None:
            return len(token_ids)
        wrong = sum(got != right for got, right in zip(token_ids, own, strict=False))
        return wrong + max(0, len(token_ids) - len(own))

    def whose(self, prompt: int, token_ids: Sequence[int]) -> str:
        """Whose tokens these are, for a message."""
        for (version, asked), own in self.tokens.items():
            if asked == prompt and own[: len(token_ids)] == list(token_ids):
                return "the base's" if version is None else f"those of version {version[:12]}"
        return "nobody's"


async def quiet_run(
    session: aiohttp.ClientSession, base: str, folders: Sequence[Path], prompts: Sequence[str], max_tokens: int
) -> Oracle:
    """Load each folder under a name of its own, ask every prompt, delete it. Raises LoadTestFailed."""
    sources: list[Source] = []
    oracle = Oracle(tuple(prompts), (), max_tokens)
    await _ask_all(session, oracle, base, None)
    for number, folder in enumerate(folders):
        name = f"quiet{number}"
        version = await load(session, name, folder)
        sources.append(Source(folder, version))
        await _ask_all(session, oracle, name, version)
        async with session.delete(f"/v1/adapters/{name}") as reply:
            if reply.status != 200:
                raise LoadTestFailed(f"deleting {name} while nobody used it: {reply.status} {await reply.text()}")
    _check_told_apart(oracle)
    return Oracle(oracle.prompts, tuple(sources), max_tokens, oracle.tokens)


async def load(session: aiohttp.ClientSession, name: str, folder: Path) -> str:
    """Load, or replace, and wait until it is done; the version it is now."""
    body = {"name": name, "source": str(folder), "load_inplace": True}
    async with session.post(f"/v1/adapters?wait={_LOAD_SECONDS}", json=body, headers=JSON) as reply:
        if reply.status not in (200, 201):
            raise LoadTestFailed(f"loading {name}: {reply.status} {(await reply.text())[:300]}")
        return str((await reply.json())["version"])


async def _ask_all(session: aiohttp.ClientSession, oracle: Oracle, model: str, version: str | None) -> None:
    for prompt, text in enumerate(oracle.prompts):
        answer = await ask(session, Question(model, prompt, text, oracle.max_tokens, False), _WHOLE_PROMPT)
        if not answer.is_whole or answer.version != version:
            raise LoadTestFailed(f"the quiet run: {model} answered {answer.error or answer.version}, not as {version}")
        oracle.tokens[version, prompt] = answer.token_ids


def _check_told_apart(oracle: Oracle) -> None:
    """Two versions that answer alike would hide a mix-up of the two."""
    for prompt in range(len(oracle.prompts)):
        answers = [tuple(own[:8]) for (_, asked), own in oracle.tokens.items() if asked == prompt]
        if len(set(answers)) < len(answers):
            raise LoadTestFailed(f"prompt {prompt} is answered alike by two versions in their first 8 tokens")
