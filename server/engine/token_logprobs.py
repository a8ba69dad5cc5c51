"""Log-probabilities of tokens under the raw logits, with the most likely alternatives. Knows nothing of sampling."""

from collections.abc import Sequence

import torch
from torch import Tensor

from server.engine.request import TokenLogprob
from server.engine.top_candidates import top_candidates

_ROWS_AT_ONCE = 8  # bounds the float32 copy: 8 rows of 150 000 logits are 5 MB


def token_logprobs(logits: Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprob]:
    """For row i of logits [n, vocab_size], any dtype: log_softmax at token_ids[i] and at its num_top[i] best tokens."""
    found: list[TokenLogprob] = []
    for begin in range(0, len(token_ids), _ROWS_AT_ONCE):
        rows = slice(begin, begin + _ROWS_AT_ONCE)
        found += _logprobs(logits[rows].float(), token_ids[rows], num_top[rows])
    return found


def _logprobs(logits: Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprob]:
    norm = logits.logsumexp(-1, keepdim=True)  # [n, 1]
    chosen = logits.gather(1, torch.tensor(token_ids, device=logits.device)[:, None]) - norm
    width = min(max(num_top), logits.shape[1])
    tops: list[list[tuple[int, float]]] = [[] for _ in token_ids]
    if width:
        values, ids = top_candidates(logits, width)
        pairs = zip(ids.tolist(), (values - norm).tolist(), strict=True)
        # Equal logprobs stand in the order of ids, as argmax has it.
        tops = [sorted(zip(*pair, strict=True), key=lambda entry: (-entry[1], entry[0])) for pair in pairs]
    return [
        TokenLogprob(token_id, logprob, tuple(top[:num]))
        for token_id, logprob, top, num in zip(token_ids, chosen[:, 0].tolist(), tops, num_top, strict=True)
    ]
