"""The next token of every row of a batch, each by its own SamplingParams.

The outcome of a row is a function of its logits, its request and nothing else: not of the other rows, nor of how often
the request was preempted. Greedy rows without penalties, bias or mask cost one maximum over the batch; only the other
rows are copied to float32. Knows nothing of the model and the scheduler.
"""

import importlib
from collections.abc import Sequence
from enum import Enum, auto
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from server.engine.logit_processors import LogitProcessors, changes_logits
from server.engine.random_draw import random_bits
from server.engine.request import Request, SampledToken, SamplingParams, TokenLogprob
from server.engine.sampling_filters import Filters, draw, draw_filtered
from server.engine.token_logprobs import token_logprobs

_ROWS_AT_ONCE = 4  # more would fall out of the processor's cache, and out of malloc's, between one pass and the next

_NO_TOKEN = -1  # in place of an id: nothing could be chosen

# numba is looked for, not demanded: a GPU machine need not have it.
_row_maximum: Any = importlib.import_module("server.engine.row_maximum") if find_spec("numba") else None


class _Way(Enum):
    """How a row whose logits are final gets its token."""

    LARGEST = auto()
    DRAW = auto()
    DRAW_FILTERED = auto()


class Sampler:
    """`vocab_size` is the width of the logits; ids from `allowed_size` on are padding of the embedding and are never
    chosen, nor do they count in any probability. A request may have a vocabulary of another size: its row is then all
    that its `num_token_ids` say, in whatever company. `forget` a request when it ends.
    """

    def __init__(self, vocab_size: int, *, allowed_size: int | None = None) -> None:
        self.allowed_size = vocab_size if allowed_size is None else min(allowed_size, vocab_size)
        self._processors = LogitProcessors()

    def forget(self, request_id: str) -> None:
        """Drop what is kept for a request between steps; unknown ids are fine."""
        self._processors.forget(request_id)

    def num_token_ids(self, request: Request) -> int:
        """Ids [0, so many) are tokens of the request."""
        return self.allowed_size if request.num_token_ids is None else request.num_token_ids

    def sample(self, logits: Tensor, requests: Sequence[Request]) -> list[SampledToken | None]:
        """One token for each row of logits [n, at least the vocabulary of each]; requests[i] is row i's.

        None for a row from which nothing can be chosen (its largest logit is NaN or infinite); the others stand.
        """
        sizes = [self.num_token_ids(request) for request in requests]
        if len(set(sizes)) <= 1:
            return self._sample(logits[:, : max(sizes, default=0)], requests)
        sampled: list[SampledToken | None] = [None] * len(requests)
        for size in sorted(set(sizes)):
            rows = [i for i, each in enumerate(sizes) if each == size]
            tokens = self._sample(_select(logits, rows)[:, :size], [requests[i] for i in rows])
            for i, token in zip(rows, tokens, strict=True):
                sampled[i] = token
        return sampled

    def _sample(self, logits: Tensor, requests: Sequence[Request]) -> list[SampledToken | None]:
        """As `sample`, for requests with one vocabulary. logits [n, num_token_ids]."""
        token_ids: list[int | None] = [None] * len(requests)
        others = [i for i, request in enumerate(requests) if not _is_plain(request)]
        if len(others) < len(requests):
            plain = sorted(set(range(len(requests))) - set(others))
            _store(token_ids, plain, _argmax(_select(logits, plain)))
        for begin in range(0, len(others), _ROWS_AT_ONCE):
            part = others[begin : begin + _ROWS_AT_ONCE]
            scores = _select(logits, part).to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            _store(token_ids, part, self._choose(scores, [requests[i] for i in part]))
        logprobs = _logprobs_by_row(logits, token_ids, requests)
        return [
            None if token_id is None else SampledToken(token_id, logprobs.get(i))
            for i, token_id in enumerate(token_ids)
        ]

    def prompt_logprobs(self, logits: Tensor, token_ids: Sequence[int], request: Request) -> list[TokenLogprob]:
        """For logits [n, vocab_size] at n positions of a prompt, the logprobs of the tokens that really came next."""
        num_top = request.sampling_params.prompt_logprobs or 0
        return token_logprobs(logits[:, : self.num_token_ids(request)], token_ids, [num_top] * len(token_ids))

    def _choose(self, logits: Tensor, requests: Sequence[Request]) -> list[int | None]:
        """Token ids for float32 logits [n, num_token_ids], which are this call's to change."""
        self._processors.apply(logits, requests)
        peak = logits.amax(-1)
        token_ids: list[int | None] = [None] * len(requests)
        groups: dict[_Way, list[int]] = {way: [] for way in _Way}
        for i, is_finite in enumerate(torch.isfinite(peak).tolist()):
            if is_finite:
                groups[_way_of(requests[i].sampling_params, logits.shape[1])].append(i)
        for way, rows in groups.items():
            if rows:
                chosen = self._choose_by(way, _select(logits, rows), _select(peak, rows), [requests[i] for i in rows])
                _store(token_ids, rows, chosen)
        return token_ids

    def _choose_by(self, way: _Way, logits: Tensor, peak: Tensor, requests: Sequence[Request]) -> Sequence[int | None]:
        """One id for each row of logits [n, num_token_ids], whose maxima are peak [n]."""
        if way is _Way.LARGEST:
            return _argmax(logits)
        params = [request.sampling_params for request in requests]
        bits = random_bits([p.seed for p in params], [len(r.output_token_ids) for r in requests])
        filters = _filters(params, logits.shape[1], logits.device)
        is_filtered = way is _Way.DRAW_FILTERED
        tokens = (
            draw_filtered(logits, peak, filters, bits) if is_filtered else draw(logits, peak, filters.temperature, bits)
        )
        ids: list[int] = tokens.tolist()
        return ids


def _filters(params: Sequence[SamplingParams], vocab_size: int, device: torch.device) -> Filters:
    return Filters(
        temperature=torch.tensor([p.temperature for p in params], dtype=torch.float32, device=device),
        top_k=torch.tensor([min(p.top_k or vocab_size, vocab_size) for p in params], device=device),
        top_p=torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device),
        min_p=torch.tensor([p.min_p for p in params], dtype=torch.float32, device=device),
    )


def _is_plain(request: Request) -> bool:
    """Whether the token is simply the largest raw logit."""
    return request.sampling_params.is_greedy and not changes_logits(request)


def _way_of(params: SamplingParams, vocab_size: int) -> _Way:
    if params.is_greedy:
        return _Way.LARGEST
    is_top_k = params.top_k is not None and params.top_k < vocab_size
    return _Way.DRAW_FILTERED if params.top_p < 1.0 or params.min_p > 0.0 or is_top_k else _Way.DRAW


def _store(token_ids: list[int | None], rows: Sequence[int], chosen: Sequence[int | None]) -> None:
    for i, token_id in zip(rows, chosen, strict=True):
        token_ids[i] = token_id


def _argmax(logits: Tensor) -> list[int | None]:
    """The first largest id of each row; None where the largest is NaN (any NaN makes it so) or infinite."""
    if _row_maximum is not None and _row_maximum.serves(logits):
        chosen: list[int] = _row_maximum.largest_ids(logits)
    else:
        peak, ids = logits.max(-1)
        chosen = torch.where(torch.isfinite(peak), ids, _NO_TOKEN).tolist()  # one wait for the device, not two
    return [None if token_id == _NO_TOKEN else token_id for token_id in chosen]


def _select(logits: Tensor, rows: list[int]) -> Tensor:
    """logits[rows]; a view where the rows are neighbours."""
    if rows[-1] - rows[0] == len(rows) - 1:
        return logits[rows[0] : rows[-1] + 1]
    return logits[torch.tensor(rows, device=logits.device)]


def _logprobs_by_row(
    logits: Tensor, token_ids: Sequence[int | None], requests: Sequence[Request]
) -> dict[int, TokenLogprob]:
    """Logprobs of the chosen tokens of the rows whose request asks for them."""
    asked = [
        (i, token_id, num_top)
        for i, (token_id, request) in enumerate(zip(token_ids, requests, strict=True))
        if token_id is not None and (num_top := request.sampling_params.logprobs) is not None
    ]
    if not asked:
        return {}
    rows = [row for row, _, _ in asked]
    found = token_logprobs(
        _select(logits, rows), [token_id for _, token_id, _ in asked], [num_top for _, _, num_top in asked]
    )
    return dict(zip(rows, found, strict=True))
