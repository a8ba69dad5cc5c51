"""One request of the churn and what became of it: token ids, the version that answered, and when. Judges nothing."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from loadtest.client import VERSION_HEADER
from loadtest.sse import EventLines

JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True, slots=True)
class Question:
    """`prompt` is the place of the prompt in the run's list."""

    model: str
    prompt: int
    text: str
    max_tokens: int
    is_stream: bool

    def body(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": self.text,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": self.is_stream,
            "return_token_ids": True,
        }


@dataclass(slots=True)
class Answer:
    """Moments are of the monotonic clock. `headed` is when the version was known: the name was resolved before it."""

    question: Question
    sent: float
    headed: float = 0.0
    ended: float = 0.0
    status: int = 0  # 0: no reply at all
    version: str | None = None
    token_ids: list[int] = field(default_factory=list)
    error: str | None = None  # why it is no whole reply
    code: str | None = None  # of the error, if the server said one

    @property
    def is_whole(self) -> bool:
        return self.error is None


async def ask(session: aiohttp.ClientSession, question: Question, extra: Mapping[str, Any] | None = None) -> Answer:
    """Send it and wait for its end, whatever that is; `extra` are further fields of the body."""
    answer = Answer(question, time.monotonic())
    data = json.dumps({**question.body(), **(extra or {})})
    try:
        async with session.post("/v1/completions", data=data, headers=JSON) as response:
            answer.headed, answer.status = time.monotonic(), response.status
            answer.version = response.headers.get(VERSION_HEADER)
            await _read(response, answer)
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    answer.ended = time.monotonic()
    answer.headed = answer.headed or answer.ended
    if answer.is_whole and len(answer.token_ids) != question.max_tokens:
        answer.error = f"{len(answer.token_ids)} tokens of {question.max_tokens}"
    return answer


async def _read(response: aiohttp.ClientResponse, answer: Answer) -> None:
    if response.status != 200:
        text = await response.text()
        answer.error, answer.code = f"{response.status}: {text[:200]}", _code_of(text)
    elif answer.question.is_stream:
        await _read_stream(response, answer)
    else:
        answer.token_ids = (await response.json())["choices"][0]["token_ids"]


async def _read_stream(response: aiohttp.ClientResponse, answer: Answer) -> None:
    lines = EventLines()
    async for chunk in response.content.iter_any():
        for payload in lines.feed(chunk):
            event = json.loads(payload)
            if error := event.get("error"):
                answer.error, answer.code = f"failed midway: {error}", _code_of(payload)
                return
            for choice in event["choices"]:
                answer.token_ids += choice["token_ids"]


def _code_of(text: str | bytes) -> str | None:
    """The code in an error's body; None when the body is something else."""
    try:
        return str(json.loads(text)["error"]["code"])
    except (ValueError, LookupError, TypeError):
        return None
