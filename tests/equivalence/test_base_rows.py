"""Base rows in a batch with adapters are bit-equal to the same batch without them: not one bit of LoRA reaches them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from server.engine.forward_batch import build_forward_batch
from server.engine.request import Request, SamplingParams
from server.engine.scheduler_output import ScheduledRow
from tests.equivalence import oracle
from tests.equivalence.architectures import CONFIGS, VOCAB, save
from tests.equivalence.harness import EngineHarness

STEPS = ((1, 1, 1, 80, 20), (1, 1, 1, 9, 1))  # new tokens per row and step: decode rows, a long run, chunks


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_base_rows_are_bit_equal(architecture: str, dtype: str, tmp_path: Path) -> None:
    base = save(architecture, tmp_path / architecture)
    adapter = oracle.make_adapter(base, tmp_path / "a", seed=1, r=8, lora_alpha=16, target_modules="all-linear")
    harness = EngineHarness.open(base, dtype)
    engine = harness.engine
    version = harness.load(adapter)
    engine.adapters.begin_step()
    generator = torch.Generator().manual_seed(3)
    requests = []
    for i in range(5):
        # The first three decode in the second step; the others are prompts throughout.
        ids = torch.randint(3, VOCAB, (1 if i < 3 else 120,), generator=generator).tolist()
        uses = (harness.use(version),) if i % 2 else ()
        request = Request(
            request_id=str(i), prompt_token_ids=tuple(ids), sampling_params=SamplingParams(), adapters=uses
        )
        request.output_token_ids.extend([5, 6] if i < 3 else [])
        request.block_table = list(range(30 * i, 30 * i + 30))
        assert engine.adapters.pin(uses)
        requests.append(request)
    engine.adapters.activate()

    for counts in STEPS:
        rows = [ScheduledRow(r, n) for r, n in zip(requests, counts, strict=True)]
        batch = build_forward_batch(rows, engine.blocks.block_size, engine.adapters.row_ranges)
        batch = replace(batch, logits_indices=batch.attention.query_starts[1:].astype("int64") - 1)
        assert batch.lora is not None
        assert batch.lora.segments and batch.attention.num_decode_rows == (0 if counts is STEPS[0] else 3)
        mixed = engine.runner.execute(batch)
        alone = engine.runner.execute(replace(batch, lora=None))
        for i in range(5):
            if i % 2:
                assert not torch.equal(mixed[i], alone[i]), "the adapter row does not feel its adapter"
            else:
                assert torch.equal(mixed[i], alone[i]), f"base row {i} changed"
        for row in rows:
            row.request.num_computed_tokens += row.num_new_tokens
