"""The engine's promises: one terminal output each, faults stay with their rows, seeds and adapters in any company."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from adapters.errors import AdapterCapacity
from adapters.ops.row_writer import CPURowWriter
from server.engine.forward_batch import ForwardBatch
from server.engine.request import FinishReason, Request
from server.errors import BadRequest
from tests.equivalence import oracle
from tests.equivalence.architectures import save
from tests.equivalence.harness import EngineHarness, Squeeze

PROMPT = tuple(range(3, 30))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def adapter(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adapters") / "a"
    return oracle.make_adapter(llama, out, seed=5, r=8, lora_alpha=16, target_modules="all-linear")


@pytest.fixture
def harness(llama: Path) -> EngineHarness:
    return EngineHarness.open(llama, "float32")


def test_a_failed_step_ends_its_requests_and_the_engine_lives(harness: EngineHarness) -> None:
    execute = harness.engine.runner.execute

    def explode(batch: ForwardBatch) -> Tensor:
        raise RuntimeError("planted")

    harness.add("doomed", PROMPT)
    harness.engine_step()
    harness.engine.runner.execute = explode  # type: ignore[method-assign]
    harness.engine_step()
    harness.engine.runner.execute = execute  # type: ignore[method-assign]
    harness.add("next", PROMPT, max_tokens=4)
    harness.run()
    assert harness.outputs["doomed"][-1].finish_reason is FinishReason.ERROR
    assert len(harness.tokens("next")) == 4


def test_a_row_without_finite_logits_ends_alone(harness: EngineHarness) -> None:
    execute = harness.engine.runner.execute

    def poison(batch: ForwardBatch) -> Tensor:
        logits = execute(batch).clone()  # what inference mode made may not be written outside it
        for i, request in enumerate(batch.sampled):
            if request.request_id == "sick" and request.num_output_tokens == 2:
                logits[i] = float("nan")
        return logits

    harness.add("alone", PROMPT, max_tokens=8)
    harness.run()
    harness.engine.runner.execute = poison  # type: ignore[method-assign]
    harness.add("sick", PROMPT[::-1], max_tokens=8)
    harness.add("well", PROMPT, max_tokens=8)
    harness.run()
    assert harness.outputs["sick"][-1].finish_reason is FinishReason.ERROR
    assert harness.tokens("well") == harness.tokens("alone")


def test_abort_frees_blocks_at_once(harness: EngineHarness) -> None:
    free = harness.engine.blocks.num_free
    harness.add("gone", PROMPT)
    harness.engine_step()
    assert harness.engine.blocks.num_free < free
    output = harness.engine.abort("gone")
    assert output is not None and output.finish_reason is FinishReason.ABORT
    assert harness.engine.blocks.num_free == free
    assert harness.engine.abort("gone") is None
    assert not harness.engine.has_work
    harness.engine.check_integrity()


def test_a_seed_gives_the_same_tokens_in_any_batch(llama: Path, adapter: Path) -> None:
    alone, crowded = EngineHarness.open(llama, "float32"), EngineHarness.open(llama, "float32", Squeeze(num_blocks=60))
    for harness in (alone, crowded):
        version = harness.load(adapter)
        harness.add("a", PROMPT, version, temperature=0.9, top_p=0.95, seed=11, max_tokens=40)
        harness.add("b", PROMPT, temperature=1.3, seed=12, max_tokens=40)
        if harness is crowded:
            for i in range(6):
                harness.add(f"noise{i}", PROMPT[i:], *([version] if i % 2 else []), temperature=1.0, seed=i)
        harness.run()
    assert alone.tokens("a") == crowded.tokens("a")
    assert alone.tokens("b") == crowded.tokens("b")
    assert len(set(alone.tokens("b"))) > 5, "the draw is stuck on few tokens: the test would prove nothing"


def test_prompt_logprobs_equal_transformers(harness: EngineHarness, llama: Path) -> None:
    harness.add("scored", PROMPT, prompt_logprobs=2, max_tokens=0)
    harness.run()
    outputs = harness.outputs["scored"]
    assert outputs[-1].finish_reason is FinishReason.LENGTH and harness.tokens("scored") == []
    found = outputs[-1].prompt_logprobs
    expected = oracle.logits(llama, None, list(PROMPT), torch.float32).log_softmax(-1)
    assert found is not None and len(found) == len(PROMPT) and found[0] is None
    for position, logprob in enumerate(found[1:], start=1):
        assert logprob is not None and logprob.token_id == PROMPT[position]
        assert logprob.logprob == pytest.approx(float(expected[position - 1, PROMPT[position]]), abs=1e-4)
        assert [token for token, _ in logprob.top] == expected[position - 1].topk(2).indices.tolist()


def test_more_adapters_than_room_all_finish(llama: Path, tmp_path: Path) -> None:
    """Six adapters of rank 8 with pool room for two: rows wait their turn, and each gets its own adapter's tokens."""
    folders = [
        oracle.make_adapter(llama, tmp_path / str(i), seed=i, r=8, lora_alpha=16, target_modules="all-linear")
        for i in range(6)
    ]
    roomy = EngineHarness.open(llama, "float32")
    row_bytes = roomy.engine.memory.lora_pools // roomy.engine.memory.lora_rows
    tight = EngineHarness.open(llama, "float32", Squeeze(lora_memory=16 * row_bytes))
    for harness in (roomy, tight):
        for i, folder in enumerate(folders):
            harness.add(str(i), PROMPT, harness.load(folder), max_tokens=16)
        harness.run()
    assert tight.max_step_adapters == 2 and roomy.max_step_adapters == 6
    assert [tight.tokens(str(i)) for i in range(6)] == [roomy.tokens(str(i)) for i in range(6)]
    assert len({tuple(roomy.tokens(str(i))) for i in range(6)}) == 6, "the adapters answer alike: nothing is proven"


def test_stats_count_activations_evictions_and_free_rows(llama: Path, tmp_path: Path) -> None:
    folders = [
        oracle.make_adapter(llama, tmp_path / str(i), seed=i, r=r, lora_alpha=16, target_modules="all-linear")
        for i, r in enumerate((8, 8, 4))
    ]
    roomy = EngineHarness.open(llama, "float32")
    row_bytes = roomy.engine.memory.lora_pools // roomy.engine.memory.lora_rows
    harness = EngineHarness.open(llama, "float32", Squeeze(lora_memory=18 * row_bytes))
    versions = [harness.load(folder) for folder in folders]
    seen = []
    for i in (0, 1, 0, 2, 1):
        harness.add(f"{len(seen)}", PROMPT, versions[i], max_tokens=2)
        harness.run()
        stats = harness.engine.stats()
        seen.append((stats.num_activations, stats.num_device_evictions, stats.num_free_lora_rows))
    # The third adapter evicts the second, which was used less than the first, and the second then evicts the third.
    assert seen == [(1, 0, 10), (2, 0, 2), (2, 0, 2), (3, 1, 6), (4, 2, 2)]
    harness.engine.unload_adapter(versions[0])
    assert harness.engine.stats().num_device_evictions == 2, "unloading is no eviction"
    assert harness.engine.stats().num_free_lora_rows == 10


def test_composition_of_two_adapters_is_their_weighted_sum(llama: Path, tmp_path: Path) -> None:
    folders = [
        oracle.make_adapter(llama, tmp_path / str(i), seed=i, r=4, lora_alpha=8, target_modules="all-linear")
        for i in range(2)
    ]
    harness = EngineHarness.open(llama, "float32")
    versions = [harness.load(folder) for folder in folders]
    harness.add("sum", PROMPT, harness.use(versions[0], 0.7), harness.use(versions[1], -0.3), max_tokens=4)
    harness.run()
    expected = oracle.weighted_logits(llama, list(zip(folders, (0.7, -0.3), strict=True)), list(PROMPT))[-1]
    scale = float(expected.abs().max())
    assert float((harness.chosen_logits("sum")[0] - expected).abs().max()) <= 1e-5 * scale


def test_prompt_logprobs_survive_preemption(llama: Path) -> None:
    """A request preempted in the middle of its prompt computes it again; its logprobs come once, and whole."""
    alone = EngineHarness.open(llama, "float32")
    tight = EngineHarness.open(llama, "float32", Squeeze(num_blocks=24, max_num_batched_tokens=8))
    for harness in (alone, tight):
        if harness is tight:
            for i in range(3):
                harness.add(f"noise{i}", PROMPT[i:], max_tokens=50)
            for _ in range(20):
                harness.engine_step()
        harness.add("scored", PROMPT * 2, prompt_logprobs=0, max_tokens=2)
        harness.run()
    assert tight.requests["scored"].num_preemptions or tight.engine.stats().num_preemptions
    found = [
        next(o.prompt_logprobs for o in harness.outputs["scored"] if o.prompt_logprobs) for harness in (alone, tight)
    ]
    assert [len(each) for each in found] == [2 * len(PROMPT)] * 2
    for one, other in zip(*(each[1:] for each in found), strict=True):
        assert one is not None and other is not None
        assert (one.token_id, one.logprob) == (other.token_id, pytest.approx(other.logprob, abs=1e-4))


def test_an_id_without_a_token_is_refused_before_it_can_fail_a_step(llama: Path) -> None:
    """Models pad their embedding: ids past the tokenizer's are in the logits but are no tokens."""
    harness = EngineHarness.open(llama, "float32", num_token_ids=100)
    harness.add("neighbour", PROMPT, max_tokens=8)
    with pytest.raises(BadRequest, match=r"outside \[0, 100\)"):
        harness.add("padded", (5, 110, 6), prompt_logprobs=0)
    del harness.requests["padded"]
    harness.run()
    assert len(harness.tokens("neighbour")) == 8 and max(harness.tokens("neighbour")) < 100


def test_an_adapter_wider_than_the_pools_is_refused_at_load(llama: Path, adapter: Path) -> None:
    roomy = EngineHarness.open(llama, "float32")
    row_bytes = roomy.engine.memory.lora_pools // roomy.engine.memory.lora_rows
    narrow = EngineHarness.open(llama, "float32", Squeeze(lora_memory=7 * row_bytes))
    with pytest.raises(AdapterCapacity, match="rank 8 .* hold 7 ranks.*--lora-memory"):
        narrow.load(adapter)
    narrow.engine.check_integrity()


def test_a_half_done_pool_write_leaves_nothing_behind(llama: Path, adapter: Path, tmp_path: Path) -> None:
    """The next adapter at those rows targets fewer modules: it must not meet the dead one's numbers on the rest."""
    slim = oracle.make_adapter(llama, tmp_path / "slim", seed=3, r=8, lora_alpha=16, target_modules=["q_proj"])
    clean, harness = EngineHarness.open(llama, "float32"), EngineHarness.open(llama, "float32")
    clean.add("slim", PROMPT, clean.load(slim), max_tokens=8)
    clean.run()

    write = CPURowWriter.write

    def fail_half_way(writer: CPURowWriter, flat: Tensor, start: int) -> None:
        write(writer, torch.cat([flat[: len(flat) // 2], torch.full_like(flat[len(flat) // 2 :], 1e3)]), start)
        raise MemoryError("planted")

    version = harness.load(adapter)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CPURowWriter, "write", fail_half_way)
        harness.add("doomed", PROMPT, version)
        harness.engine_step()
    assert harness.outputs["doomed"][-1].finish_reason is FinishReason.ERROR
    harness.engine.check_integrity()
    harness.add("slim", PROMPT, harness.load(slim), max_tokens=8)
    harness.run()
    assert harness.tokens("slim") == clean.tokens("slim")


def test_outputs_made_before_a_failing_update_still_go_out(harness: EngineHarness) -> None:
    harness.add("first", PROMPT, max_tokens=1)
    harness.add("second", PROMPT[::-1], max_tokens=4)
    commit = harness.engine.blocks.commit

    def fail_for_second(request: Request) -> None:
        if request.request_id == "second":
            raise RuntimeError("planted")
        commit(request)

    harness.engine.blocks.commit = fail_for_second  # type: ignore[method-assign]
    for _ in range(4):
        harness.engine_step()
    harness.engine.blocks.commit = commit  # type: ignore[method-assign]
    harness.run()
    assert harness.outputs["first"][-1].finish_reason is FinishReason.LENGTH
    assert harness.outputs["second"][-1].finish_reason is FinishReason.ERROR


def test_a_version_in_use_is_not_freed(harness: EngineHarness, adapter: Path) -> None:
    version = harness.load(adapter)
    harness.add("user", PROMPT, version, max_tokens=4)
    with pytest.raises(RuntimeError, match="in use"):
        harness.engine.unload_adapter(version)
    harness.run()
    harness.engine.unload_adapter(version)
    harness.engine.check_integrity()


def test_scores_that_are_not_finite_end_with_an_error(harness: EngineHarness) -> None:
    execute = harness.engine.runner.execute
    harness.engine.runner.execute = lambda batch: torch.full_like(execute(batch), float("nan"))  # type: ignore[method-assign]
    harness.add("scored", PROMPT, prompt_logprobs=0, max_tokens=0)
    harness.run()
    assert harness.outputs["scored"][-1].finish_reason is FinishReason.ERROR
