"""The next token of every row chosen on the device, without waiting for it: what look-ahead samples with.

Gives the tokens that `Sampler` gives, from the same seeds, by whole-number weights that add up alike everywhere.
Serves the requests of `samples_on_device`; the others need numbers that only the host has. Knows no scheduler.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from server.engine.device_step import HostBuffer
from server.engine.logit_processors import changes_logits
from server.engine.random_draw import random_bits
from server.engine.request import Request, SamplingParams
from server.engine.sampling_filters import Filters, kept_candidates, weigh

_NO_TOKEN = -1  # in ids on the device: the row's largest logit was not finite
_WORDS_PER_ROW = 12  # int64 row, top_k, low and high half of the bits; float64 top_p; float32 temperature and min_p


def samples_on_device(request: Request) -> bool:
    """Whether a token needs the raw logits and the seed alone: no penalties, bias or mask, no logprobs, and no
    vocabulary of its own, whose ids the next step must know on the host."""
    params = request.sampling_params
    if request.num_token_ids is not None:
        return False
    return params.logprobs is None and params.prompt_logprobs is None and not changes_logits(request)


@dataclass(frozen=True, slots=True)
class TokensUnderWay:
    """Token ids on their way to the host."""

    _ids: Tensor  # int64 [num_rows], on the host
    _arrived: torch.cuda.Event | None

    def read(self) -> list[int | None]:
        """Wait for the ids; None for a row from which nothing could be chosen."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return [None if token_id == _NO_TOKEN else token_id for token_id in self._ids.tolist()]


@dataclass(frozen=True, slots=True)
class _Draws:
    """The settings of the rows that draw, on the device."""

    rows: Tensor  # int64 [n] of the logits
    filters: Filters
    low: Tensor  # int64 [n] the lower 32 of each row's 64 random bits
    high: Tensor  # int64 [n] the upper 32
    is_filtered: bool  # by top_k, top_p or min_p, in any row


class DeviceSampler:
    """`last_ids` [max_num_seqs] on the device holds what the latest `launch` chose, -1 where nothing could be."""

    def __init__(self, allowed_size: int, max_num_seqs: int, device: torch.device) -> None:
        self.last_ids = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._allowed_size = allowed_size
        self._device = device
        self._hosts = [HostBuffer(device), HostBuffer(device)]

    @torch.inference_mode()
    def launch(self, logits: Tensor, requests: Sequence[Request]) -> TokensUnderWay:
        """Choose a token for each row of logits [n, vocab_size]; requests[i] is row i's and samples on the device."""
        logits = logits[:, : self._allowed_size]
        peak, ids = logits.max(-1)
        drawing = [i for i, request in enumerate(requests) if not request.sampling_params.is_greedy]
        if drawing:
            draws = self._send_draws(drawing, [requests[i] for i in drawing])
            ids[draws.rows] = _draw(logits[draws.rows].float(), peak[draws.rows].float(), draws)
        chosen = self.last_ids[: len(requests)]
        chosen.copy_(torch.where(torch.isfinite(peak), ids, _NO_TOKEN))
        return self._bring_home(chosen)

    def _bring_home(self, ids: Tensor) -> TokensUnderWay:
        if self._device.type != "cuda":
            return TokensUnderWay(ids.clone(), None)
        home = torch.empty(len(ids), dtype=torch.int64, pin_memory=True)
        home.copy_(ids, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return TokensUnderWay(home, arrived)

    def _send_draws(self, rows: Sequence[int], requests: Sequence[Request]) -> _Draws:
        """All settings in one copy."""
        params = [request.sampling_params for request in requests]
        bits = random_bits([p.seed for p in params], [len(r.output_token_ids) for r in requests])
        n = len(rows)
        host = self._hosts[0]
        self._hosts.reverse()
        words = host.reserve(_WORDS_PER_ROW * n)[: _WORDS_PER_ROW * n]
        whole = words[: 8 * n].view(np.int64).reshape(4, n)
        whole[0], whole[1] = rows, [self._top_k(p) for p in params]
        whole[2], whole[3] = bits & np.uint64(0xFFFFFFFF), bits >> np.uint64(32)
        words[8 * n : 10 * n].view(np.float64)[:] = [p.top_p for p in params]
        words[10 * n : 11 * n].view(np.float32)[:] = [p.temperature for p in params]
        words[11 * n :].view(np.float32)[:] = [p.min_p for p in params]
        sent = torch.empty(_WORDS_PER_ROW * n, dtype=torch.int32, device=self._device)
        host.send(sent)
        at, top_k, low, high = sent[: 8 * n].view(torch.int64).view(4, n).unbind()
        filters = Filters(
            temperature=sent[10 * n : 11 * n].view(torch.float32),
            top_k=top_k,
            top_p=sent[8 * n : 10 * n].view(torch.float64),
            min_p=sent[11 * n :].view(torch.float32),
        )
        is_filtered = any(p.top_p < 1.0 or p.min_p > 0.0 or self._top_k(p) < self._allowed_size for p in params)
        return _Draws(at, filters, low, high, is_filtered)

    def _top_k(self, params: SamplingParams) -> int:
        return min(params.top_k or self._allowed_size, self._allowed_size)


def _draw(logits: Tensor, peak: Tensor, draws: _Draws) -> Tensor:
    """[n] ids drawn from softmax(logits / temperature) over what the filters keep. logits [n, vocab_size] float32."""
    weights = weigh(logits, peak, draws.filters.temperature)
    if draws.is_filtered:
        weights.masked_fill_(logits < _threshold(logits, peak, draws.filters), 0)
    ends = weights.cumsum(-1)
    target = _scale_below(draws.low, draws.high, ends[:, -1])
    return torch.searchsorted(ends, target[:, None], right=True)[:, 0]


def _threshold(logits: Tensor, peak: Tensor, filters: Filters) -> Tensor:
    """[n, 1] the smallest logit that passes the filters. Sorts whole rows: which of them could be spared the sort
    would have to be asked of the device."""
    values = logits.sort(-1, descending=True).values
    weights = weigh(values, peak, filters.temperature)
    kept = kept_candidates(values, weights, weights.sum(-1), filters, logits.shape[1])
    return values.gather(1, kept.sum(-1, keepdim=True).clamp(min=1) - 1)


def _scale_below(low: Tensor, high: Tensor, total: Tensor) -> Tensor:
    """floor((high · 2^32 + low) · total / 2^64), exactly, for total < 2^58: no product passes 2^63.

    With total = t1 · 2^29 + t0 and floor(floor(a / m) / n) = floor(a / (m · n)), one half at a time:
    floor((x · total + carry) / 2^32) = (x · t1 + (x · t0 + carry) >> 29) >> 3.
    """
    t1, t0 = total >> 29, total & ((1 << 29) - 1)
    carry = (low * t1 + ((low * t0) >> 29)) >> 3
    return (high * t1 + ((high * t0 + carry) >> 29)) >> 3
