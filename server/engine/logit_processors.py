"""What changes logits before a token is chosen: penalties, logit_bias, the min_tokens mask, in this order.

All three touch few tokens of a row, so they are applied to the rows of a batch as one list of flat positions.
Knows nothing of temperatures and draws.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from server.engine.request import Request, SamplingParams

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


def has_penalties(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0


def masks_stop_ids(request: Request) -> bool:
    """Whether the request is still too short to end."""
    return len(request.output_token_ids) < request.sampling_params.min_tokens and bool(request.stop_ids)


def changes_logits(request: Request) -> bool:
    params = request.sampling_params
    return has_penalties(params) or bool(params.logit_bias) or masks_stop_ids(request)


@dataclass(slots=True)
class _TokenCounts:
    """The distinct tokens of one request and how often each stands in its output (0: only in the prompt)."""

    position: dict[int, int] = field(default_factory=dict)
    ids: IntArray = field(default_factory=lambda: np.empty(64, np.int64))
    counts: FloatArray = field(default_factory=lambda: np.zeros(64, np.float32))
    num_outputs: int = 0

    @classmethod
    def of_prompt(cls, token_ids: Iterable[int]) -> "_TokenCounts":
        counts = cls()
        for token_id in token_ids:
            counts._position_of(token_id)
        return counts

    def catch_up(self, output_token_ids: Sequence[int]) -> None:
        for token_id in output_token_ids[self.num_outputs :]:
            at = self._position_of(token_id)  # first, since it may replace the array
            self.counts[at] += 1
        self.num_outputs = len(output_token_ids)

    def _position_of(self, token_id: int) -> int:
        at = self.position.setdefault(token_id, len(self.position))
        if at == len(self.ids):
            self.ids = np.concatenate([self.ids, np.empty_like(self.ids)])
            self.counts = np.concatenate([self.counts, np.zeros_like(self.counts)])
        self.ids[at] = token_id
        return at


class LogitProcessors:
    """Applies a batch's changes to its logits; keeps the token counts of requests with penalties between steps."""

    def __init__(self) -> None:
        self._counts: dict[str, _TokenCounts] = {}

    def forget(self, request_id: str) -> None:
        self._counts.pop(request_id, None)

    def apply(self, logits: Tensor, requests: Sequence[Request]) -> None:
        """Change logits [n, vocab_size] float32 of `requests` in place. Ids outside the vocabulary are left out."""
        self._penalise(logits, requests)
        _add_bias(logits, requests)
        _mask_stop_ids(logits, requests)

    def _penalise(self, logits: Tensor, requests: Sequence[Request]) -> None:
        """l = l / r where l > 0 else l · r for tokens seen; then l -= frequency · count + presence · (count > 0)."""
        rows = [i for i, request in enumerate(requests) if has_penalties(request.sampling_params)]
        if not rows:
            return
        counts = [self._counts_of(requests[i]) for i in rows]
        sizes = [len(c.position) for c in counts]
        params = [requests[i].sampling_params for i in rows]
        at, valid = _flat_positions(logits, rows, [c.ids[:size] for c, size in zip(counts, sizes, strict=True)])

        def per_token(value: Callable[[SamplingParams], float]) -> Tensor:
            repeated = np.repeat(np.array([value(p) for p in params], np.float32), sizes)
            return torch.from_numpy(repeated[valid]).to(logits.device)

        all_counts = np.concatenate([c.counts[:size] for c, size in zip(counts, sizes, strict=True)])[valid]
        count = torch.from_numpy(all_counts).to(logits.device)
        repetition = per_token(lambda p: p.repetition_penalty)
        flat = logits.view(-1)
        values = flat[at]
        values = torch.where(values > 0, values / repetition, values * repetition)
        values -= per_token(lambda p: p.frequency_penalty) * count
        values -= per_token(lambda p: p.presence_penalty) * (count > 0)
        flat[at] = values

    def _counts_of(self, request: Request) -> _TokenCounts:
        counts = self._counts.get(request.request_id)
        if counts is None:
            counts = self._counts[request.request_id] = _TokenCounts.of_prompt(request.prompt_token_ids)
        counts.catch_up(request.output_token_ids)
        return counts


def _add_bias(logits: Tensor, requests: Sequence[Request]) -> None:
    """l[id] += logit_bias[id]."""
    rows = [i for i, request in enumerate(requests) if request.sampling_params.logit_bias]
    if not rows:
        return
    biases = [requests[i].sampling_params.logit_bias for i in rows]
    at, valid = _flat_positions(logits, rows, [np.fromiter(bias, np.int64, len(bias)) for bias in biases])
    values = np.array([value for bias in biases for value in bias.values()], np.float32)
    logits.view(-1)[at] += torch.from_numpy(values[valid]).to(logits.device)


def _mask_stop_ids(logits: Tensor, requests: Sequence[Request]) -> None:
    """l[id] = -inf for the stop ids of requests that have not reached min_tokens."""
    rows = [i for i, request in enumerate(requests) if masks_stop_ids(request)]
    if rows:
        ids = [np.fromiter(requests[i].stop_ids, np.int64, len(requests[i].stop_ids)) for i in rows]
        logits.view(-1)[_flat_positions(logits, rows, ids)[0]] = -torch.inf


def _flat_positions(
    logits: Tensor, rows: Sequence[int], ids: Sequence[IntArray]
) -> tuple[Tensor, npt.NDArray[np.bool_]]:
    """Positions row · vocab_size + id in the flat logits of those ids that exist, and which of all ids these are."""
    vocab_size = logits.shape[1]
    all_ids = np.concatenate(ids)
    valid = (all_ids >= 0) & (all_ids < vocab_size)
    at = np.repeat(np.array(rows, np.int64) * vocab_size, [len(row_ids) for row_ids in ids]) + all_ids
    return torch.from_numpy(at[valid]).to(logits.device), valid
