"""PEFT's mixed batches behind HTTP, as a peer to measure: the requests that wait are one `generate(adapter_names=[…])`.

Batches are static, as PEFT offers them: who comes while one runs waits for the next. Tokens are streamed as they are
generated, so that the time to the first one is the client's. Run as a process of its own; nothing here imports it.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from aiohttp import web
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

BASE_NAME = "base"
_PEFT_BASE = "__base__"  # PEFT's name for a row without an adapter
_GATHER_SECONDS = 0.02  # a batch waits this long for company
_TRIAL_STEPS = 3

Event = dict[str, Any] | None  # None ends a reply


@dataclass(frozen=True, slots=True, eq=False)
class Waiting:
    """A request that no batch has taken yet, or that one is answering."""

    model: str
    prompt: str
    max_tokens: int
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)


class Batcher:
    """Owns the model: takes up to `max_batch` waiting requests at a time and generates for all of them at once."""

    def __init__(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, *, max_batch: int) -> None:
        self._generate_ids: Any = model.generate  # unannotated in PEFT
        self._tokenizer, self._max_batch = tokenizer, max_batch
        self.names = {BASE_NAME, *model.peft_config}
        self.queue: asyncio.Queue[Waiting] = asyncio.Queue()

    async def run_forever(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self.queue.get()]
            await asyncio.sleep(_GATHER_SECONDS)
            while len(batch) < self._max_batch and not self.queue.empty():
                batch.append(self.queue.get_nowait())
            try:
                await loop.run_in_executor(None, self._generate, batch, loop)
            except Exception as error:  # whatever it was, the clients of this batch must hear it
                for each in batch:
                    each.events.put_nowait({"error": {"message": f"{type(error).__name__}: {error}"}})
                    each.events.put_nowait(None)

    @torch.inference_mode()
    def _generate(self, batch: list[Waiting], loop: asyncio.AbstractEventLoop) -> None:
        inputs = self._tokenizer([each.prompt for each in batch], return_tensors="pt", padding=True)
        lengths = [int(count) for count in inputs["attention_mask"].sum(dim=1)]  # [batch]
        longest = max(each.max_tokens for each in batch)
        self._generate_ids(
            **inputs,
            adapter_names=[_PEFT_BASE if each.model == BASE_NAME else each.model for each in batch],
            do_sample=False,
            min_new_tokens=longest,  # as ignore_eos asks
            max_new_tokens=longest,
            streamer=BatchStreamer(self._tokenizer, batch, lengths, loop),
        )


class BatchStreamer(BaseStreamer):  # type: ignore[misc,unused-ignore]
    """Hands each generated token to the request of its row; a row that has all it asked for hears no more."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        batch: list[Waiting],
        prompt_lengths: list[int],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._tokenizer, self._batch, self._prompt_lengths, self._loop = tokenizer, batch, prompt_lengths, loop
        self._num_generated = -1  # the first call brings the prompts

    def put(self, value: torch.Tensor) -> None:
        """`value`: [batch, prompt] at the first call, then one token a row, [batch]."""
        self._num_generated += 1
        if self._num_generated == 0:
            return
        for each, token, prompt_length in zip(self._batch, value.tolist(), self._prompt_lengths, strict=True):
            if self._num_generated <= each.max_tokens:
                self._send(each, {"choices": [{"index": 0, "text": self._tokenizer.decode([token])}]})
            if self._num_generated == each.max_tokens:
                usage = {"prompt_tokens": prompt_length, "completion_tokens": each.max_tokens}
                self._send(each, {"choices": [], "usage": usage})
                self._send(each, None)

    def end(self) -> None:
        """Each row ended by itself."""

    def _send(self, waiting: Waiting, event: Event) -> None:
        self._loop.call_soon_threadsafe(waiting.events.put_nowait, event)


def create_app(batcher: Batcher) -> web.Application:
    async def completions(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if body["model"] not in batcher.names:
            return web.json_response({"error": {"message": f"no adapter {body['model']!r}"}}, status=404)
        waiting = Waiting(body["model"], body["prompt"], body["max_tokens"])
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        batcher.queue.put_nowait(waiting)
        while (event := await waiting.events.get()) is not None:
            await response.write(f"data: {json.dumps(event)}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response

    async def health(_: web.Request) -> web.Response:
        return web.Response()

    async def start(app: web.Application) -> None:
        app[_RUNNING] = asyncio.create_task(batcher.run_forever())

    app = web.Application()
    app.router.add_post("/v1/completions", completions)
    app.router.add_get("/health", health)
    app.on_startup.append(start)
    return app


_RUNNING: web.AppKey[asyncio.Task[None]] = web.AppKey("running", asyncio.Task)


def load(base: Path, adapters: list[Path]) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The base in bfloat16 and every adapter unmerged, in the float32 that PEFT prefers and that is faster here.

    An adapter's name is its folder's.
    """
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    first, *others = adapters
    model = PeftModel.from_pretrained(plain, first, adapter_name=first.name)
    for folder in others:
        model.load_adapter(folder, adapter_name=folder.name)
    return model.eval(), tokenizer


def choose_threads(model: PeftModel, candidates: Sequence[int]) -> int:
    """The number of threads with which a decode step of one row an adapter is fastest on this machine."""
    names = list(model.peft_config)
    tokens = torch.zeros(len(names), 1, dtype=torch.long)  # [rows, 1]

    @torch.inference_mode()
    def seconds(threads: int) -> float:
        torch.set_num_threads(threads)
        times = []
        for _ in range(_TRIAL_STEPS):
            start = time.perf_counter()
            model(input_ids=tokens, adapter_names=names)
            times.append(time.perf_counter() - start)
        return min(times)

    return min(candidates, key=seconds)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtest.peft_server", description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="a Hugging Face model folder")
    parser.add_argument("--adapters", type=Path, nargs="+", required=True, help="PEFT adapter folders")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--threads", type=int, help="tried out at the start if unset")
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.base, arguments.adapters)
    threads = arguments.threads or choose_threads(model, sorted({1, torch.get_num_threads()}))
    print(f"{threads} threads", flush=True)
    torch.set_num_threads(threads)
    batcher = Batcher(model, tokenizer, max_batch=arguments.max_batch)
    web.run_app(create_app(batcher), host="127.0.0.1", port=arguments.port, print=None)


if __name__ == "__main__":
    main()
