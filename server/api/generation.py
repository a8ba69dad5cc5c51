"""One generation: (prompts × n) admitted engine requests under one hold, and their streams turned into text.

Both routes, streaming or not, read it; server/api/admission.py makes it. Knows nothing of JSON, of HTTP, or of how
replies look. Whatever ends a generation, `close` gives everything back: live requests are aborted, their metrics ended,
the adapters released.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from server.api.adapter_hold import AdapterHold
from server.api.context import RequestStream
from server.api.leasing import refuse_revoked
from server.engine.request import FinishReason, RequestOutput, SamplingParams, TokenLogprob
from server.errors import EngineFailure, Unavailable
from server.metrics import RequestMetrics
from server.text_stream import TextStream
from server.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_MAX_BUFFERED = 64  # deltas of all choices that wait for a slow reader

_ENGINE_FAILED = "The engine failed while it worked on this request; the request was not finished."
_SHUT_DOWN = "The server is shutting down and did not finish this request; send it again."


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, encoded, with what the engine is asked to do with it. `text` is what `echo` repeats."""

    token_ids: tuple[int, ...]
    params: SamplingParams
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSpec:
    """What to generate: choice i of prompt p has index p · n + i."""

    prompts: tuple[Prompt, ...]
    n: int = 1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceDelta:
    """What one engine output brought to one choice. `finish_reason` is set on the last delta and only there."""

    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class Usage:
    """Tokens of a whole generation. A prompt counts once however many choices it has."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass(slots=True, kw_only=True)
class Choice:
    """One engine request on its way to text."""

    index: int
    is_first_of_prompt: bool
    stream: RequestStream
    hold: AdapterHold
    text: TextStream
    metrics: RequestMetrics
    usage: Usage
    is_finished: bool = False

    async def deltas(self) -> AsyncIterator[ChoiceDelta]:
        async for output in self.stream:
            delta = self._take(output)
            yield delta
            if delta.finish_reason is not None:
                return
        if not self.is_finished:
            raise EngineFailure(_ENGINE_FAILED)

    def _take(self, output: RequestOutput) -> ChoiceDelta:
        self.metrics.observe(output)
        self._check_end(output)
        ended = output.finish_reason is not None
        text_ids = output.new_token_ids[:-1] if output.stop_token_id is not None else output.new_token_ids
        pushed = self.text.push(text_ids, finished=ended)
        used = len(output.new_token_ids)
        reason = output.finish_reason
        if pushed.stopped is not None:
            used, reason = pushed.num_tokens, FinishReason.STOP
        self._count(output, used)
        if reason is not None:
            self._finish(reason)
        return ChoiceDelta(
            index=self.index,
            text=pushed.text,
            token_ids=output.new_token_ids[:used],
            logprobs=(output.logprobs or ())[:used],
            prompt_logprobs=output.prompt_logprobs,
            finish_reason=reason,
        )

    def _check_end(self, output: RequestOutput) -> None:
        """An end that is not the request's own is an error to the client; what went wrong stays in the log."""
        if output.finish_reason is FinishReason.ERROR:
            logger.error("request %s failed in the engine: %s", output.request_id, output.error)
            self.is_finished = True
            raise EngineFailure(_ENGINE_FAILED)
        if output.finish_reason is FinishReason.ABORT:
            self.is_finished = True
            refuse_revoked(self.hold)
            raise Unavailable(_SHUT_DOWN)

    def _count(self, output: RequestOutput, num_used: int) -> None:
        self.usage.completion_tokens += num_used
        if self.is_first_of_prompt and output.num_cached_tokens:
            self.usage.cached_tokens += output.num_cached_tokens
            self.is_first_of_prompt = False

    def _finish(self, reason: FinishReason) -> None:
        self.is_finished = True
        self.stream.abort()  # nothing when the engine ended it; the engine's stop when a stop string did
        self.metrics.finish(reason)

    def close(self) -> None:
        self.stream.abort()
        self.metrics.finish(FinishReason.ABORT)
        self.is_finished = True


@dataclass(slots=True, kw_only=True, eq=False)
class Generation:
    """Admitted choices under one hold. Read `deltas` to the end or not at all; call `close` in either case."""

    spec: GenerationSpec
    hold: AdapterHold
    tokenizer: Tokenizer  # of the request
    choices: list[Choice]
    usage: Usage
    _pumps: list[asyncio.Task[None]] = field(default_factory=list)

    def deltas(self) -> AsyncIterator[ChoiceDelta]:
        """The deltas of all choices as they come; raises EngineFailure or Unavailable when one of them is lost."""
        return self.choices[0].deltas() if len(self.choices) == 1 else self._merged()

    async def _merged(self) -> AsyncIterator[ChoiceDelta]:
        merged: asyncio.Queue[ChoiceDelta | Exception] = asyncio.Queue(_MAX_BUFFERED)
        self._pumps.extend(asyncio.create_task(_pump(choice, merged)) for choice in self.choices)
        num_open = len(self.choices)
        while num_open:
            item = await merged.get()
            if isinstance(item, Exception):
                raise item
            num_open -= item.finish_reason is not None
            yield item

    def revoke(self) -> None:
        """Let every choice end where it is; whoever reads `deltas` is told why."""
        for choice in self.choices:
            choice.stream.abort()

    def close(self) -> None:
        """Give everything back; idempotent."""
        for pump in self._pumps:
            pump.cancel()
        for choice in self.choices:
            if not choice.is_finished:
                choice.close()
        self.hold.release()


async def _pump(choice: Choice, merged: "asyncio.Queue[ChoiceDelta | Exception]") -> None:
    try:
        async for delta in choice.deltas():
            await merged.put(delta)
    except Exception as error:
        await merged.put(error)


@dataclass(slots=True)
class ChoiceResult:
    """One choice, whole."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: FinishReason | None = None

    def add(self, delta: ChoiceDelta) -> None:
        self.text += delta.text
        self.token_ids.extend(delta.token_ids)
        self.logprobs.extend(delta.logprobs)
        self.prompt_logprobs = delta.prompt_logprobs or self.prompt_logprobs
        self.finish_reason = delta.finish_reason


async def collect(generation: Generation) -> list[ChoiceResult]:
    """Every choice to its end, by index."""
    results = [ChoiceResult() for _ in generation.choices]
    async for delta in generation.deltas():
        results[delta.index].add(delta)
    return results
