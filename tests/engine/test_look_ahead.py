"""Look-ahead changes no token: steps launched before the last one's tokens are known, against the same run in turn.

The scheduler is held against a device that computes nothing until it is read, so that whoever looks at a token too
early finds it pending; the engine against itself without look-ahead, on a real tiny model.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from zlib import crc32

import pytest
import torch
from torch import Tensor

from server.config import SchedulerConfig
from server.engine.device_sampler import TokensUnderWay
from server.engine.forward_batch import ForwardBatch
from server.engine.request import FinishReason, Request, RequestStatus, SampledToken
from server.engine.scheduler_output import PENDING_TOKEN_ID, SchedulerOutput, has_pending_token
from tests.engine.fake_step import VOCAB_SIZE, FakeEngine, make_request
from tests.engine.test_scheduler_machine import MAX_MODEL_LEN, draw_request
from tests.equivalence import oracle
from tests.equivalence.architectures import VOCAB, save
from tests.equivalence.harness import EngineHarness, Squeeze


@dataclass
class _LaunchedRow:
    """What a device is told of one row; token ids may end in PENDING_TOKEN_ID."""

    request: Request
    token_ids: list[int]
    slots: list[int]  # of token_ids
    num_computed: int
    num_outputs: int
    samples: bool


@dataclass
class LateDevice:
    """Computes a launched step when it is read, from what it was told at the launch; checks every slot it reads."""

    block_size: int
    slots: dict[int, tuple[object, ...]] = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)  # request id → its token in the step read last

    def launch(self, scheduled: SchedulerOutput) -> list[_LaunchedRow]:
        return [self._row(row.request, row.num_new_tokens, row.samples) for row in scheduled.rows]

    def read(self, rows: list[_LaunchedRow]) -> dict[str, SampledToken]:
        for row in rows:
            row.token_ids = [self.last[row.request.request_id] if t == PENDING_TOKEN_ID else t for t in row.token_ids]
            for position in range(row.num_computed):
                assert self.slots[row.slots[position]] == self._history(row, position), "reads another's slot"
        for row in rows:
            for position in range(row.num_computed, len(row.token_ids)):
                self.slots[row.slots[position]] = self._history(row, position)
        self.last = {row.request.request_id: self._token(row) for row in rows if row.samples}
        return {request_id: SampledToken(token) for request_id, token in self.last.items()}

    def _row(self, request: Request, num_new_tokens: int, samples: bool) -> _LaunchedRow:
        end = request.num_computed_tokens + num_new_tokens
        slots = [request.block_table[p // self.block_size] * self.block_size + p % self.block_size for p in range(end)]
        token_ids = request.token_ids(0, end)
        return _LaunchedRow(request, token_ids, slots, request.num_computed_tokens, request.num_output_tokens, samples)

    def _history(self, row: _LaunchedRow, position: int) -> tuple[object, ...]:
        return row.request.adapters, tuple(row.token_ids[: position + 1])

    def _token(self, row: _LaunchedRow) -> int:
        """As fake_step.next_token."""
        token = crc32(repr((row.request.adapters, tuple(row.token_ids))).encode()) % VOCAB_SIZE
        if row.num_outputs < row.request.sampling_params.min_tokens:
            while token in row.request.stop_ids:
                token = (token + 1) % VOCAB_SIZE
        return token


class AheadEngine(FakeEngine):
    """A FakeEngine that launches the next step before it reads the one under way."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.device = LateDevice(self.blocks.block_size)
        self.before: tuple[SchedulerOutput, list[_LaunchedRow]] | None = None
        self.num_ahead = self.num_dropped = self.num_preempted_pending = 0

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self.before is not None

    def step(self) -> SchedulerOutput:
        scheduled = self.scheduler.schedule()
        self.check_step(scheduled)
        self.num_preempted_pending += sum(has_pending_token(self.requests[name]) for name in scheduled.preempted)
        launched = (scheduled, self.device.launch(scheduled))
        if self.before is not None:
            self.num_ahead += any(has_pending_token(row.request) for row in scheduled.rows)
            self.collect(self.scheduler.update(self.before[0], self.device.read(self.before[1])))
            self.num_dropped += sum(row.request.status.is_finished for row in scheduled.rows)
        self.before = launched
        self.scheduler.advance(scheduled)
        self.scheduler.check_integrity()
        if not scheduled.rows:
            self.drain()
        return scheduled

    def drain(self) -> None:
        assert self.before is not None
        self.collect(self.scheduler.update(self.before[0], self.device.read(self.before[1])))
        self.before = None

    def run(self, max_steps: int = 2000) -> None:
        for _ in range(max_steps):
            if not self.has_work:
                return
            self.step()
        raise AssertionError(f"still at work after {max_steps} steps")


def soak(random: Random, seen: Counter[str]) -> None:
    block_size = random.randint(1, 4)
    engine = AheadEngine(
        SchedulerConfig(
            max_num_seqs=random.randint(2, 6),
            max_num_batched_tokens=random.randint(2, 16),
            max_bypassed_steps=random.randrange(4),
        ),
        num_blocks=24 // block_size + random.randrange(8),
        block_size=block_size,
        num_rows=random.randint(2, 4),
        max_model_len=MAX_MODEL_LEN,
        enable_prefix_caching=random.random() < 0.8,
    )
    ended: set[str] = set()
    for _ in range(60):
        if random.random() < 0.4:
            engine.add_if_it_fits(draw_request(random).named(len(engine.requests)))
        if engine.requests and random.random() < 0.08:
            name = random.choice(sorted(engine.requests))
            seen["aborted with a pending token"] += has_pending_token(engine.requests[name])
            output = engine.scheduler.abort(name)
            engine.collect([output] if output else [])
            ended |= {name} if output else set()
        if random.random() < 0.02:
            failed = [row.request.request_id for row in engine.before[0].rows] if engine.before else []
            ended |= {name for name in failed if not engine.requests[name].status.is_finished}
            engine.collect(engine.scheduler.fail(failed, "the device failed"))
            engine.before = None
            seen["failed"] += bool(failed)
        engine.step()
    engine.run()
    engine.scheduler.check_integrity()
    for request in engine.requests.values():
        engine.check_end(request, was_ended=request.request_id in ended)
    seen.update(
        {
            "ahead": engine.num_ahead,
            "dropped": engine.num_dropped,
            "preempted with a pending token": engine.num_preempted_pending,
            "prefix_hits": engine.scheduler.stats().prefix_hits,
        }
    )
    assert engine.blocks.num_free == engine.blocks.num_blocks


def test_soak_gives_every_request_the_tokens_it_gets_alone() -> None:
    seen: Counter[str] = Counter()
    for seed in range(120):
        soak(Random(seed), seen)
    rare = ("aborted with a pending token", "dropped", "preempted with a pending token", "failed", "prefix_hits")
    assert seen["ahead"] > 2000 and all(seen[event] >= 20 for event in rare), seen


def test_nothing_is_computed_for_a_request_whose_last_token_is_under_way() -> None:
    engine = AheadEngine(num_blocks=8)
    engine.add(make_request("r", max_tokens=3))
    steps = [[row.num_new_tokens for row in engine.step().rows] for _ in range(4)]
    assert steps == [[3], [1], [1], []]
    assert engine.requests["r"].status is RequestStatus.FINISHED_LENGTH and not engine.has_work


def test_a_stop_drops_the_token_that_was_already_under_way() -> None:
    request = make_request("r", max_tokens=100)
    engine = AheadEngine()
    tokens = FakeEngine()
    tokens.add(make_request("r", max_tokens=5))
    tokens.run()
    stopped = make_request("r", max_tokens=100, stop_ids=(tokens.tokens("r")[-1],))
    engine.add(stopped)
    engine.run()
    assert engine.tokens("r")[-1] in stopped.stop_ids and engine.num_dropped == 1
    assert engine.outputs["r"][-1].finish_reason is FinishReason.STOP
    assert request.status is RequestStatus.WAITING and engine.blocks.num_free == engine.blocks.num_blocks


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def adapters(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    out = tmp_path_factory.mktemp("adapters")
    return [
        oracle.make_adapter(llama, out / str(r), seed=r, r=r, lora_alpha=2 * r, target_modules="all-linear")
        for r in (4, 8)
    ]


def _open(llama: Path, *, look_ahead: bool, squeeze: Squeeze | None = None) -> EngineHarness:
    return EngineHarness.open(llama, "float32", squeeze, look_ahead=look_ahead)


def _random_workload(harness: EngineHarness, folders: list[Path], seed: int) -> None:
    """Arrivals and aborts in the middle, greedy and drawn tokens, stops, filters, and now and then a request that
    needs the host for every token."""
    random = Random(seed)
    versions = [harness.load(folder) for folder in folders]
    for i in range(14):
        prompt = [random.randrange(3, VOCAB) for _ in range(random.randrange(3, 30))]
        uses = random.choice([[], [versions[0]], [versions[1]], versions])
        greedy = random.random() < 0.4
        sampling: dict[str, object] = {
            "max_tokens": random.randrange(1, 40),
            "temperature": 0.0 if greedy else random.choice([0.7, 1.5]),
            "seed": i,
            **random.choice([{}, {}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"top_k": 20, "top_p": 0.8}]),
        }
        if i % 7 == 6:
            sampling |= random.choice([{"frequency_penalty": 0.5}, {"logprobs": 2}, {"prompt_logprobs": 0}])
        harness.add(str(i), prompt, *uses, stop_ids=frozenset(random.sample(range(VOCAB), 3)), **sampling)
        for _ in range(random.randrange(4)):
            harness.engine_step()
    harness.run()


@pytest.mark.parametrize("seed", range(4))
def test_tokens_equal_those_without_look_ahead(llama: Path, adapters: list[Path], seed: int) -> None:
    squeeze = Squeeze(num_blocks=22, max_num_seqs=6)
    plain, ahead = (_open(llama, look_ahead=is_ahead, squeeze=squeeze) for is_ahead in (False, True))
    launched = _count_launches(ahead)
    for harness in (plain, ahead):
        _random_workload(harness, adapters, seed)
    assert ahead.engine.stats().num_preemptions > 0 and launched["carried"] > 20
    for name in plain.requests:
        assert ahead.tokens(name) == plain.tokens(name), name
        reasons = [harness.outputs[name][-1].finish_reason for harness in (plain, ahead)]
        assert reasons[0] is reasons[1], name
    assert {o[-1].finish_reason for o in plain.outputs.values()} == {FinishReason.STOP, FinishReason.LENGTH}


def _count_launches(harness: EngineHarness) -> Counter[str]:
    seen: Counter[str] = Counter()
    execute = harness.engine.runner.execute

    def counting(batch: ForwardBatch, last_ids: Tensor | None = None) -> Tensor:
        seen["steps"] += 1
        seen["carried"] += batch.carried is not None and bool((batch.carried >= 0).any())
        return execute(batch, last_ids)

    harness.engine.runner.execute = counting  # type: ignore[method-assign]
    return seen


def test_an_abort_with_a_token_under_way_ends_once_and_frees_its_blocks(llama: Path) -> None:
    harness = _open(llama, look_ahead=True)
    harness.add("gone", range(3, 20))
    harness.add("stays", range(3, 30), max_tokens=6)
    for _ in range(3):
        harness.engine_step()
    output = harness.engine.abort("gone")
    assert output is not None and output.finish_reason is FinishReason.ABORT
    harness.outputs["gone"].append(output)
    harness.add("gone2", range(3, 20), max_tokens=4)
    harness.run()
    assert harness.engine.blocks.num_free == harness.engine.blocks.num_blocks
    alone = _open(llama, look_ahead=False)
    alone.add("stays", range(3, 30), max_tokens=6)
    alone.run()
    assert harness.tokens("stays") == alone.tokens("stays")


@pytest.mark.parametrize("fails", ["launch", "read"])
def test_a_failed_step_ends_its_requests_once_and_the_engine_lives(llama: Path, fails: str) -> None:
    harness = _open(llama, look_ahead=True)
    for name in ("a", "b"):
        harness.add(name, range(3, 20))
    for _ in range(4):
        harness.engine_step()

    def explode(*_: object) -> list[int | None]:
        raise RuntimeError("planted")

    with pytest.MonkeyPatch.context() as patch:
        if fails == "launch":
            patch.setattr(harness.engine.runner, "execute", explode)
        else:
            patch.setattr(TokensUnderWay, "read", explode)
        harness.engine_step()
    for name in ("a", "b"):
        assert harness.outputs[name][-1].finish_reason is FinishReason.ERROR
    harness.add("next", range(3, 20), max_tokens=4)
    harness.run()
    assert len(harness.tokens("next")) == 4


def test_a_row_without_finite_logits_ends_alone(llama: Path) -> None:
    alone, harness = _open(llama, look_ahead=False), _open(llama, look_ahead=True)
    alone.add("well", range(3, 20), max_tokens=8)
    alone.run()
    execute = harness.engine.runner.execute

    def poison(batch: ForwardBatch, last_ids: Tensor | None = None) -> Tensor:
        logits = execute(batch, last_ids).clone()
        for i, request in enumerate(batch.sampled):
            if request.request_id == "sick" and request.num_output_tokens == 2:
                logits[i] = torch.nan
        return logits

    harness.engine.runner.execute = poison  # type: ignore[method-assign]
    harness.add("sick", range(30, 40), max_tokens=8)
    harness.add("well", range(3, 20), max_tokens=8)
    harness.run()
    assert harness.outputs["sick"][-1].finish_reason is FinishReason.ERROR and len(harness.tokens("sick")) == 2
    assert harness.tokens("well") == alone.tokens("well")
