"""The load-time proof: our packed, chunked, paged forward against the model's own, or the model is refused.

Two sequences of random tokens go through the engine's way (a mixed step of a chunk and a whole prompt, a second
chunk beside a decode row, then two decode rows) and, one by one, through the model's own eager attention.
"""

import torch
from torch import Tensor

from server.engine.attention.interface import AttentionMetadata
from server.engine.base_model import BaseModel, ModelRefused, attention_implementation
from server.engine.forward_batch import build_forward_batch
from server.engine.kv_cache import allocate
from server.engine.request import Request, SamplingParams
from server.engine.scheduler_output import ScheduledRow

_BLOCK_SIZE = 4
_STEPS = ((5, 9), (6, 1), (1, 1))  # new tokens of the two sequences in each step
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of the largest logit; measured on tiny and real models


def check(base: BaseModel) -> float:
    """Largest difference of logits relative to the largest logit; raises ModelRefused when it is too large."""
    sequences = _sequences(base)
    ours = _engine_logits(base, sequences)
    own = _own_logits(base, sequences)
    scale = float(own.abs().max())
    error = float((ours - own).abs().max()) / max(scale, 1e-6)
    limit = _TOLERANCE[base.dtype]
    if not error <= limit:  # also true for NaN
        raise ModelRefused(
            f"{base.name} ({base.config.model_type}): paged attention gives other logits than the model's own forward "
            f"(relative error {error:.1e}, limit {limit:.0e}); this architecture is not served. "
            "--skip-probe serves it anyway, with wrong answers"
        )
    return error


def _sequences(base: BaseModel) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = [sum(step[i] for step in _STEPS) for i in range(2)]
    return [torch.randint(base.vocab_size, (n,), generator=generator).tolist() for n in lengths]


def _own_logits(base: BaseModel, sequences: list[list[int]]) -> Tensor:
    """[sum of lengths, vocab], float32."""
    rows = []
    with attention_implementation(base.model, "eager"), torch.inference_mode():
        for ids in sequences:
            tokens = torch.tensor([ids], device=base.device)
            positions = torch.arange(len(ids), device=base.device)[None]
            out = base.model(input_ids=tokens, position_ids=positions, use_cache=False)
            rows.append(out.logits[0].float())
    return torch.cat(rows)


def _engine_logits(base: BaseModel, sequences: list[list[int]]) -> Tensor:
    """The same through the paged cache, whose block tables interleave so that a wrong table shows."""
    base.attach(allocate(base.kv_shapes, 16, _BLOCK_SIZE, base.dtype, base.device))
    requests = [
        Request(request_id=str(i), prompt_token_ids=tuple(ids), sampling_params=SamplingParams())
        for i, ids in enumerate(sequences)
    ]
    for i, request in enumerate(requests):
        request.block_table = list(range(15 - i, 0, -2))
    parts: list[list[Tensor]] = [[], []]
    for step in _STEPS:
        rows = [ScheduledRow(r, n) for r, n in zip(requests, step, strict=True)]
        rows.sort(key=lambda row: row.num_new_tokens != 1)  # one-token rows come first in every batch
        batch = build_forward_batch(rows, _BLOCK_SIZE, lambda _: ())
        logits = _run(base, batch.input_ids, batch.positions, batch.attention)
        for row, part in zip(rows, logits.split([row.num_new_tokens for row in rows]), strict=True):
            parts[int(row.request.request_id)].append(part)
            row.request.num_computed_tokens += row.num_new_tokens
    return torch.cat([torch.cat(part) for part in parts])


def _run(base: BaseModel, input_ids: object, positions: object, metadata: AttentionMetadata) -> Tensor:
    with torch.inference_mode(), base.context.running(metadata):
        ids = torch.as_tensor(input_ids, device=base.device)
        return base.forward(
            ids, torch.as_tensor(positions, device=base.device), torch.arange(len(ids), device=base.device)
        ).float()
