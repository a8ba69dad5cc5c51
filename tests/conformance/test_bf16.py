"""Adapters as PEFT writes them, in bfloat16: recorded steps have the bits of the model's own code, and the error to
float32 is of the size of PEFT's own.

All variants of an architecture are rows of one batch, so that decode steps mix them; as rows end, company changes.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from adapters.ops import bf16_dot
from adapters.step_features import RECORDABLE, StepFeature
from server.engine.recorded_runner import RecordedRunner
from tests.conformance.batch import BASE, ROOMY, Row, Served, World, serve
from tests.conformance.oracle import PeftOracle

VARIANTS: dict[str, tuple[str, ...]] = {
    "llama": (
        "plain", "rslora", "dora", "mts_norm", "embed", "embed_dora", "head", "head_dora", "mts_embed", "mts_head",
        "tokens", "tokens_head", "ln_tuning", "weighted_dora", "sum_with_dora",
    ),
    "qwen2": ("plain", "lora_bias", "bias_all", "bias_lora_only", "dora_bias", "embed_head"),
    "gemma2": ("plain", "dora", "mts_norm", "embed", "head", "tokens", "mts_both"),
}  # fmt: skip
"""llama has a head of its own; qwen2 has biases; gemma2 is tied, scales its embedding, caps its logits."""
NUM_ALONE = 5  # tokens


@dataclass(frozen=True)
class Run:
    world: World
    recorded: Served
    eager: Served


@pytest.fixture(scope="module", params=VARIANTS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    world = World.make(request.param, VARIANTS[request.param], tmp_path_factory.mktemp(request.param))
    recorded, eager = (serve(world, ROOMY, dtype="bfloat16", use_graphs=use) for use in (True, False))
    for served in (recorded, eager):
        assert not served.refused
        for row in world.rows:  # and a step of this one kind, which company makes another
            uses = served.harness.requests[row.name].adapters
            served.harness.add(_alone(row), row.prompt, *uses, max_tokens=NUM_ALONE)
            served.harness.run()
    return Run(world, recorded, eager)


def _alone(row: Row) -> str:
    return f"{row.name}, alone"


@pytest.mark.skipif(not bf16_dot.is_supported(), reason="steps are recorded where our products are")
def test_recorded_steps_have_the_bits_of_the_model_s_own_code(run: Run) -> None:
    runner = run.recorded.harness.engine.runner
    assert isinstance(runner, RecordedRunner) and not isinstance(run.eager.harness.engine.runner, RecordedRunner)
    played = {kind.features for kind, step in runner._steps.items() if step.recording is not None}
    assert not any(step.is_eager for step in runner._steps.values())
    assert {0, StepFeature.AFFINE, StepFeature.EMBEDDING | StepFeature.HEAD | StepFeature.AFFINE} <= played
    assert all(not features & ~RECORDABLE for features in played)
    ours, theirs = run.recorded.harness, run.eager.harness
    for name in ours.requests:
        assert ours.tokens(name) == theirs.tokens(name), name
        assert torch.equal(ours.chosen_logits(name), theirs.chosen_logits(name)), name
    for row in run.world.rows:
        assert ours.tokens(_alone(row)) == ours.tokens(row.name)[:NUM_ALONE], f"{row.name}: the company is felt"


def test_the_error_is_at_most_twice_that_of_peft_in_bfloat16(run: Run) -> None:
    """Against PEFT in float32, on the tokens we chose; and each adapter does more than rounding."""
    judged = 0
    for row in run.world.rows:
        if not isinstance(row.oracle, PeftOracle):  # the base, and sums, which PEFT does not compute
            continue
        judged += 1
        ids, begin = [*row.prompt, *run.recorded.tokens(row)], len(row.prompt)
        exact = row.oracle.logits(ids, begin)[begin - 1 : -1]
        theirs = replace(row.oracle, dtype=torch.bfloat16).logits(ids, begin)[begin - 1 : -1]
        ours = run.recorded.logits(row, exact.shape[1])
        error, allowed = (_sizes(logits - exact) for logits in (ours, theirs))
        assert error[0] <= 2 * allowed[0] and error[1] <= 2 * allowed[1], f"{row.name}: {error}, PEFT's {allowed}"
        effect = exact - run.world.rows[0].oracle.logits(ids, begin)[begin - 1 : -1]
        assert _sizes(effect)[0] > 2 * error[0], f"{row.name}: the adapter does nothing"
    assert judged == sum(row.name != BASE and len(row.uses) == 1 and row.uses[0][1] == 1.0 for row in run.world.rows)


def _sizes(error: Tensor) -> tuple[float, float]:
    """Root of the mean square, and the largest."""
    return float(error.square().mean().sqrt()), float(error.abs().max())
