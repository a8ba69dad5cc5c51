"""The bridge: admission, streams, aborts, drain and the engine thread's death, on a real tiny engine."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import torch

from adapters.adapter_ref import AdapterVersion
from adapters.lora_model import LoRAModel, LoRAWeights
from server.async_engine import AsyncEngine
from server.config import SchedulerConfig
from server.engine.engine import Engine, StepResult
from server.engine.request import FinishReason, Request, RequestOutput, SamplingParams
from server.errors import BadRequest, QueueFull, Unavailable
from server.request_stream import RequestStream
from tests.equivalence.architectures import save
from tests.equivalence.harness import EngineHarness

PROMPT = tuple(range(3, 30))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def core(llama: Path) -> Engine:
    return EngineHarness.open(llama, "float32").engine


@pytest_asyncio.fixture
async def engine(core: Engine) -> AsyncIterator[AsyncEngine]:
    running = AsyncEngine(core, SchedulerConfig(max_num_seqs=4, max_waiting=4))
    running.start()
    yield running
    await running.drain(timeout=0)
    core.check_integrity()


class _Fatal(BaseException):
    """What ends a thread, and no `except Exception` catches."""


def request(request_id: str, **sampling: object) -> Request:
    params = SamplingParams(**{"temperature": 0.0, "ignore_eos": True, **sampling})  # type: ignore[arg-type]
    return Request(request_id=request_id, prompt_token_ids=PROMPT, sampling_params=params)


async def collect(stream: RequestStream) -> list[RequestOutput]:
    return [output async for output in stream]


@pytest.mark.asyncio
async def test_streams_end_with_one_terminal_output(engine: AsyncEngine) -> None:
    streams = engine.admit([request(str(i), max_tokens=8) for i in range(4)])
    for outputs in await asyncio.gather(*map(collect, streams)):
        assert [o.finish_reason for o in outputs if o.finish_reason] == [FinishReason.LENGTH]
        assert sum(len(o.new_token_ids) for o in outputs) == 8
    assert engine.num_live == 0
    await engine.check_integrity()


@pytest.mark.asyncio
async def test_admits_all_or_none(engine: AsyncEngine) -> None:
    streams = engine.admit([request(str(i), max_tokens=200) for i in range(5)])
    with pytest.raises(QueueFull, match="limit of 8"):
        engine.admit([request(f"more{i}") for i in range(4)])
    assert engine.num_live == 5
    for stream in streams:
        stream.abort()
    for outputs in await asyncio.gather(*map(collect, streams)):
        assert outputs[-1].finish_reason is FinishReason.ABORT


@pytest.mark.asyncio
async def test_abort_frees_blocks_within_a_step(engine: AsyncEngine, core: Engine) -> None:
    free = core.blocks.num_free
    (stream,) = engine.admit([request("gone", max_tokens=200)])
    await anext(stream)
    stream.abort()
    outputs = await collect(stream)
    assert outputs[-1].finish_reason is FinishReason.ABORT
    await engine.check_integrity()
    assert core.blocks.num_free == free and not core.has_work
    stream.abort()  # after the end: nothing happens


@pytest.mark.asyncio
async def test_drain_lets_requests_finish_and_admits_no_more(core: Engine) -> None:
    engine = AsyncEngine(core, SchedulerConfig())
    engine.start()
    (stream,) = engine.admit([request("last", max_tokens=50)])
    draining = asyncio.create_task(engine.drain(timeout=30))
    await asyncio.sleep(0)
    with pytest.raises(Unavailable):
        engine.admit([request("late")])
    outputs = await collect(stream)
    assert await draining and outputs[-1].finish_reason is FinishReason.LENGTH
    with pytest.raises(Unavailable):
        await engine.check_integrity()


@pytest.mark.asyncio
async def test_drain_ends_what_does_not_finish_in_time(core: Engine) -> None:
    engine = AsyncEngine(core, SchedulerConfig())
    engine.start()
    (stream,) = engine.admit([request("long", max_tokens=220)])
    assert not await engine.drain(timeout=0)
    outputs = await collect(stream)
    assert [o.finish_reason for o in outputs if o.finish_reason] == [FinishReason.ABORT]
    assert outputs[-1].error is not None and "shut down" in outputs[-1].error


@pytest.mark.asyncio
async def test_the_threads_death_ends_every_request(core: Engine) -> None:
    engine = AsyncEngine(core, SchedulerConfig())

    def die() -> StepResult:
        raise SystemError("planted")

    core.step = die  # type: ignore[method-assign]
    engine.start()
    streams = engine.admit([request(str(i)) for i in range(3)])
    for outputs in await asyncio.gather(*map(collect, streams)):
        assert [o.finish_reason for o in outputs] == [FinishReason.ERROR]
    assert not engine.is_healthy
    with pytest.raises(Unavailable):
        engine.admit([request("after")])


@pytest.mark.asyncio
async def test_a_request_that_can_never_run_ends_with_an_error(engine: AsyncEngine) -> None:
    unknown = request("unknown")
    unknown.prompt_token_ids = tuple(range(3, 100)) * 60  # longer than the cache
    (stream,) = engine.admit([unknown])
    outputs = await collect(stream)
    assert [o.finish_reason for o in outputs] == [FinishReason.ERROR]


@pytest.mark.asyncio
async def test_observers_see_every_step(engine: AsyncEngine) -> None:
    seen: list[int] = []
    engine.add_observer(lambda stats: seen.append(stats.num_step_rows))
    streams = engine.admit([request(str(i), max_tokens=4) for i in range(3)])
    await asyncio.gather(*map(collect, streams))
    assert max(seen) == 3 and sum(seen) >= 12


@pytest.mark.asyncio
async def test_a_cancelled_load_does_not_hurt_the_engine(engine: AsyncEngine) -> None:
    (stream,) = engine.admit([request("bystander", max_tokens=20)])
    asking = asyncio.ensure_future(engine.check_integrity())
    asking.cancel()
    assert (await collect(stream))[-1].finish_reason is FinishReason.LENGTH
    await engine.check_integrity()
    assert engine.is_healthy


@pytest.mark.asyncio
async def test_nobody_waits_for_ever_on_a_dead_thread(core: Engine) -> None:
    """Messages the thread had taken but not handled are refused too."""
    engine = AsyncEngine(core, SchedulerConfig())

    def die() -> None:
        raise _Fatal("planted")

    core.check_integrity = die  # type: ignore[method-assign]
    engine.start()
    asked = [engine.check_integrity(), engine.check_integrity()]
    answers = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), timeout=10)
    assert isinstance(answers[0], _Fatal) and isinstance(answers[1], Unavailable)
    assert not engine.is_healthy


@pytest.mark.asyncio
async def test_what_can_never_be_admitted_is_no_matter_of_waiting(engine: AsyncEngine) -> None:
    with pytest.raises(BadRequest, match="9 outputs .* at most 8 .*--max-num-seqs and --max-waiting"):
        engine.admit([request(str(i)) for i in range(9)])
    assert engine.num_live == 0


@pytest.mark.asyncio
async def test_draining_takes_no_adapters(core: Engine) -> None:
    """Unloads and checks still go through: what runs must come to its end."""
    engine = AsyncEngine(core, SchedulerConfig())
    engine.start()
    (stream,) = engine.admit([request("last", max_tokens=50)])
    draining = asyncio.create_task(engine.drain(timeout=30))
    await asyncio.sleep(0)
    name, shape = next(iter(engine.info.base.linears.items()))
    weights = LoRAWeights(torch.zeros(2, shape.in_features), torch.zeros(2, shape.out_features))
    model = LoRAModel(version=AdapterVersion("v"), modules={name: weights})
    with pytest.raises(Unavailable, match="shutting down"):
        await engine.load_adapter(model)
    await engine.unload_adapter(AdapterVersion("unknown"))
    await engine.check_integrity()
    await collect(stream)
    assert await draining
