"""Adapters with extras through the whole engine: chunked prompts, decode rows, preemption, recorded steps."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.adapter_ref import AdapterVersion
from adapters.ops import bf16_dot, cpu, cpu_affine
from adapters.step_features import RECORDABLE, StepFeature
from server.engine.recorded_runner import RecordedRunner
from tests.adapters.drawn_extras import KINDS, oracle, parts_of, untied
from tests.engine.extras_world import (
    CHUNKS,
    HEAD_MAJOR,
    ONES,
    Uses,
    chosen,
    draw_all,
    known_parts_of_every_base,
    prompt,
    saved,
    serve,
    wanted,
)
from tests.equivalence import harness as harnesses
from tests.equivalence.architectures import build
from tests.equivalence.harness import EngineHarness, Squeeze

__all__ = ["known_parts_of_every_base"]
pytestmark = pytest.mark.usefixtures("known_parts")

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gpt2", *HEAD_MAJOR)
MIXED: dict[str, Uses] = {
    **ONES,
    "half": [("dora", 0.5)],
    "two": [("dora_and_bias", 0.7), ("embedding_lora", 0.3)],
    "three": [("norms", 0.5), ("head_lora", 0.5), ("plain", 1.0)],
    "heads": [("full_copies", 0.5), ("head_lora", 1.0)],
    "base": [],
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kind_in_one_engine_equals_the_model_with_its_weights(architecture: str, tmp_path: Path) -> None:
    folder = saved(architecture, tmp_path)
    stock, adapters = draw_all(folder, torch.float32, list(KINDS))
    harness = serve(folder, "float32", adapters, MIXED, CHUNKS)
    for name, uses in MIXED.items():
        got, want = chosen(harness, name), wanted(stock, adapters, uses, harness, name)
        columns = min(got.shape[1], want.shape[1])
        limit = 1e-5 * float(want.abs().max().clamp(min=1))
        torch.testing.assert_close(
            got[:, :columns], want[:, :columns], rtol=0, atol=limit, msg=lambda m, n=name: f"{n} {m}"
        )
    alone = serve(folder, "float32", {}, {"base": []}, CHUNKS)
    assert alone.tokens("base") == harness.tokens("base")


def test_a_base_row_has_the_bits_it_has_alone(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    _, adapters = draw_all(folder, torch.float32, list(KINDS))
    roomy = Squeeze(max_num_batched_tokens=400, max_num_seqs=20)
    plain_too = {kind: [("plain", 1.0)] for kind in KINDS}
    with_extras, with_pairs = (
        serve(folder, "float32", adapters, {**uses, "base": []}, roomy) for uses in (ONES, plain_too)
    )
    base = [chosen(each, "base")[:, :128] for each in (with_extras, with_pairs)]
    assert torch.equal(*base)


def test_preemption_changes_nothing(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    stock, adapters = draw_all(folder, torch.float32, ["dora", "norms", "embedding_rows", "head_lora"])
    requests: dict[str, Uses] = {kind: [(kind, 1.0)] for kind in adapters}
    tight = Squeeze(max_num_batched_tokens=9, num_blocks=14, block_size=4)
    harness = serve(folder, "float32", adapters, requests, tight)
    for name, uses in requests.items():
        want = wanted(stock, adapters, uses, harness, name)
        torch.testing.assert_close(harness.chosen_logits(name), want, rtol=0, atol=1e-5 * float(want.abs().max()))


def test_rows_that_move_take_their_extras_along(tmp_path: Path) -> None:
    """Pools of so few rows that adapters evict each other all the time."""
    folder = saved("llama", tmp_path)
    stock, adapters = draw_all(folder, torch.float32, ["dora", "norms", "ia3", "head_lora", "plain"])
    requests: dict[str, Uses] = {f"{kind}{turn}": [(kind, 1.0)] for turn in range(2) for kind in adapters}
    base = parts_of(stock)
    row_bytes = sum(shape.in_features + shape.out_features for shape in base.linears.values()) * 4
    harness = serve(folder, "float32", adapters, requests, replace(CHUNKS, lora_memory=9 * row_bytes, max_num_seqs=3))
    assert harness.engine.adapters.pool.num_evictions > 2
    for name, uses in requests.items():
        want = wanted(stock, adapters, uses, harness, name)
        torch.testing.assert_close(harness.chosen_logits(name), want, rtol=0, atol=1e-5 * float(want.abs().max()))
    for adapter in adapters.values():
        harness.engine.unload_adapter(adapter.version)
    harness.engine.check_integrity()
    assert not harness.engine.adapters.layers.extras.starts


@pytest.mark.parametrize("keeps_logits", [True, False])
def test_prompt_logprobs_are_the_adapter_s(keeps_logits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the head that are prompts', in any order among those that sample; some models compute all tokens'."""
    folder = saved("llama", tmp_path)
    load = harnesses.load_base_model
    monkeypatch.setattr(harnesses, "load_base_model", lambda *args: replace(load(*args), keeps_logits=keeps_logits))
    stock, adapters = draw_all(folder, torch.float32, ["head_lora", "wider", "dora"])
    harness = EngineHarness.open(folder, "float32", CHUNKS)
    for kind, adapter in adapters.items():
        harness.engine.load_adapter(adapter)
        harness.add(kind, prompt(2), adapter.version, prompt_logprobs=1, max_tokens=3)
        harness.add(f"{kind} quiet", prompt(3), adapter.version, max_tokens=4)
        harness.engine_step()
    harness.run()
    for kind in ("head_lora", "dora"):
        model: Any = oracle(stock, parts_of(stock), [(adapters[kind], 1.0)])
        with torch.inference_mode():
            want = model(input_ids=torch.tensor([prompt(2)]), use_cache=False).logits[0].log_softmax(-1)
        found = next(output.prompt_logprobs for output in harness.outputs[kind] if output.prompt_logprobs)
        for position, logprob in enumerate(found[1:], start=1):
            assert logprob is not None
            assert logprob.logprob == pytest.approx(float(want[position - 1, logprob.token_id]), abs=1e-4)
    for kind in adapters:
        want = wanted(stock, adapters, [(kind, 1.0)], harness, kind)
        got = chosen(harness, kind)
        columns = min(got.shape[1], want.shape[1])
        torch.testing.assert_close(got[:, :columns], want[:, :columns], rtol=0, atol=1e-5 * float(want.abs().max()))


RECORDED = ["plain", "dora", "dora_and_bias", "norms", "embedding_lora", "embedding_rows", "head_lora", "full_copies"]
where_recorded = pytest.mark.skipif(not bf16_dot.is_supported(), reason="steps are recorded where our products are")


def in_bf16(adapters: dict[str, Any]) -> dict[str, Any]:
    """Tables in the compute dtype, as a loader makes them."""
    found = {}
    for kind, adapter in adapters.items():
        extras = adapter.extras
        parts = {}
        for name in ("embedding", "head"):
            part = getattr(extras, name)
            if part is not None:
                tensors = {n: getattr(part, n) for n in ("lora_a", "lora_b", "weight") if hasattr(part, n)}
                cast: dict[str, Any] = {n: None if t is None else t.bfloat16() for n, t in tensors.items()}
                if part.rows is not None:
                    cast["rows"] = replace(part.rows, values=part.rows.values.bfloat16())
                parts[name] = replace(part, **cast)
        found[kind] = replace(adapter, extras=replace(extras, **parts))
    return found


@where_recorded
def test_recorded_steps_have_the_bits_of_the_model_s_own_code(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    _, adapters = draw_all(folder, torch.bfloat16, RECORDED)
    adapters = in_bf16(adapters)
    requests: dict[str, Uses] = {kind: [(kind, 1.0)] for kind in RECORDED}
    requests |= {"two": [("dora", 0.5), ("norms", 0.5)], "head two": [("head_lora", 0.5), ("full_copies", 0.5)]}
    requests |= {"base": [], **{f"again {kind}": [(kind, 0.5)] for kind in RECORDED}}
    roomy = Squeeze(max_num_batched_tokens=64, max_num_seqs=20)
    recorded, eager = (serve(folder, "bfloat16", adapters, requests, roomy, use_graphs=use) for use in (True, False))
    for kind in RECORDED:  # kinds of steps that no company makes another
        for harness in (recorded, eager):
            harness.add(f"alone {kind}", prompt(9), adapters[kind].version, max_tokens=5)
            harness.run()
    runner = recorded.engine.runner
    assert isinstance(runner, RecordedRunner)
    played = {kind.features for kind, step in runner._steps.items() if step.recording is not None}
    assert {0, StepFeature.AFFINE, StepFeature.EMBEDDING, StepFeature.HEAD, RECORDABLE} <= played
    assert not any(step.is_eager for step in runner._steps.values())
    for name in recorded.requests:
        assert recorded.tokens(name) == eager.tokens(name)
        assert torch.equal(recorded.chosen_logits(name), eager.chosen_logits(name)), name


@where_recorded
@pytest.mark.parametrize("kind", RECORDED)
def test_a_row_has_the_same_bits_alone_and_in_company(kind: str, tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    _, adapters = draw_all(folder, torch.bfloat16, RECORDED)
    adapters = in_bf16(adapters)
    roomy = Squeeze(max_num_batched_tokens=64, max_num_seqs=20)
    requests: dict[str, Uses] = {other: [(other, 1.0)] for other in RECORDED} | {f"{kind} too": [(kind, 1.0)]}
    together = serve(folder, "bfloat16", adapters, requests, roomy)
    alone = serve(folder, "bfloat16", adapters, {kind: [(kind, 1.0)]}, roomy)
    assert together.tokens(kind) == alone.tokens(kind)
    assert torch.equal(together.chosen_logits(kind), alone.chosen_logits(kind))


@where_recorded
def test_a_recorded_step_of_plain_adapters_has_no_more_kernels_than_before(tmp_path: Path) -> None:
    """One LoRA call a group, and none of the affine operation, though adapters with extras are resident."""
    folder = saved("llama", tmp_path)
    _, adapters = draw_all(folder, torch.bfloat16, RECORDED)
    adapters, counts = in_bf16(adapters), []
    for loaded in (["plain"], RECORDED):
        requests: dict[str, Uses] = {kind: [(kind, 1.0)] for kind in loaded}
        harness = serve(folder, "bfloat16", {kind: adapters[kind] for kind in loaded}, requests, Squeeze())
        harness.add("last", prompt(3), AdapterVersion(adapters["plain"].version), max_tokens=5)
        harness.run()
        runner = harness.engine.runner
        assert isinstance(runner, RecordedRunner)
        steps = {kind: step.recording for kind, step in runner._steps.items() if step.recording is not None}
        found = next(recording for kind, recording in steps.items() if kind == (1, True, 0))
        counts.append((found.num_kernels, found.num_operations))
        calls = [call for part in found._parts if hasattr(part, "_calls") for call in part._calls]
        kernels = [function for function, _, _ in calls]
        groups = harness.engine.adapters.layers._groups
        assert kernels.count(cpu._KERNELS[torch.bfloat16].address) == len(groups)
        assert kernels.count(cpu_affine._KERNELS[torch.bfloat16].address) == 0
    assert counts[0] == counts[1]


def test_the_oracle_s_copy_is_the_model_itself() -> None:
    stock = build("gemma2").requires_grad_(False)
    ids = torch.arange(9)[None]
    copied: Any = untied(stock, parts_of(stock))
    torch.testing.assert_close(copied(input_ids=ids).logits, stock(input_ids=ids).logits)
