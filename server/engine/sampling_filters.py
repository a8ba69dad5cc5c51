"""Which tokens a draw may choose (top_k, top_p, min_p), and the draw itself, without sorting the vocabulary.

Probabilities are held as whole numbers: weight = floor(e^((l - max) / T) · 2^40). Whole numbers add up to the same sum
in any order, so a row's outcome cannot depend on its batch, on the order of candidates or on the number of threads;
what is cut off is less than 2^-40 of the most likely token for each token.

A filter keeps the tokens whose logit reaches a threshold, so equal logits stay or go together:
  top_k  the k-th largest logit;
  top_p  the largest t such that the tokens >= t hold at least top_p of what top_k kept;
  min_p  the logit whose probability is min_p of the largest.
Most thresholds lie among the 256 largest logits. Where one does not, top_k is found by selection and top_p by a
histogram of weights, of which one bin is sorted; both ways give the same tokens. Knows no requests.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from server.engine.random_draw import scale_below
from server.engine.top_candidates import top_candidates

WEIGHT_BITS = 40
_NUM_CANDIDATES = 256
_BLOCK = 256
_NUM_BINS = 1024
_SPAN = 28.0  # nats below the peak that the bins cover; e^-28 < 2^-40, so what lies deeper weighs nothing
_MIN_TEMPERATURE = 1e-5  # below it differences overflow; the largest logit has all the weight long before

Bits = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Filters:
    """The settings of n rows, one entry each; a row whose settings filter nothing should not come here."""

    temperature: Tensor  # [n] float32
    top_k: Tensor  # [n] int64, at least 1; vocab_size = no top_k
    top_p: Tensor  # [n] float64; 1 = no top_p
    min_p: Tensor  # [n] float32; 0 = no min_p

    def rows(self, index: Tensor) -> "Filters":
        return Filters(self.temperature[index], self.top_k[index], self.top_p[index], self.min_p[index])


def weigh(logits: Tensor, peak: Tensor, temperature: Tensor) -> Tensor:
    """floor(e^((logits - peak) / temperature) · 2^40), int64 [n, m]. logits [n, m] float32, the others [n]."""
    return _depth(logits, peak, temperature).neg_().exp_().mul_(float(1 << WEIGHT_BITS)).to(torch.int64)


def _depth(logits: Tensor, peak: Tensor, temperature: Tensor) -> Tensor:
    """(peak - logits) / temperature, float32 [n, m], at least 0."""
    return (peak[:, None] - logits).div_(temperature.clamp(min=_MIN_TEMPERATURE)[:, None])


def draw(logits: Tensor, peak: Tensor, temperature: Tensor, bits: Bits) -> Tensor:
    """[n] ids drawn from softmax(logits / temperature). logits [n, vocab_size] float32 with finite maxima peak [n]."""
    return _draw_by_weight(weigh(logits, peak, temperature), bits)


def draw_filtered(logits: Tensor, peak: Tensor, filters: Filters, bits: Bits) -> Tensor:
    """[n] ids drawn from softmax(logits / temperature) restricted to what the filters keep and renormalised."""
    width = min(_NUM_CANDIDATES, logits.shape[1])
    mass = _mass(logits, peak, filters)
    values, ids = top_candidates(logits, width)
    weights = weigh(values, peak, filters.temperature)
    kept = kept_candidates(values, weights, mass, filters, logits.shape[1])
    ids, order = ids.sort(-1)
    weights = (weights * kept).gather(1, order)
    tokens = ids.gather(1, _first_above(weights.cumsum(-1), bits))[:, 0]
    # A candidate left out is smaller than all kept ones, and so is every token that is no candidate.
    open_rows = kept.all(-1).nonzero()[:, 0]
    if width < logits.shape[1] and len(open_rows):
        wide_bits = bits[open_rows.cpu().numpy()]
        tokens[open_rows] = _draw_wide(logits[open_rows], peak[open_rows], filters.rows(open_rows), wide_bits)
    return tokens


def _mass(logits: Tensor, peak: Tensor, filters: Filters) -> Tensor:
    """int64 [n] sum of weights over the vocabulary, of the rows where top_p asks for it; 0 where it is not needed."""
    mass = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    rows = ((filters.top_p < 1.0) & (filters.top_k == logits.shape[1])).nonzero()[:, 0]
    if len(rows):
        chosen = logits if len(rows) == len(logits) else logits[rows]
        mass[rows] = weigh(chosen, peak[rows], filters.temperature[rows]).sum(-1)
    return mass


def kept_candidates(values: Tensor, weights: Tensor, mass: Tensor, filters: Filters, vocab_size: int) -> Tensor:
    """bool [n, width]: which candidates pass, a leading part of each row, right wherever it is not the whole row.

    values [n, width] are sorted, largest first; mass [n] is the weight of the vocabulary where there is no top_k.
    """
    width = values.shape[1]
    has_top_k = (filters.top_k < vocab_size)[:, None]
    in_top_k = ~has_top_k | (values >= values.gather(1, filters.top_k.clamp(max=width)[:, None] - 1))
    limited = weights * in_top_k
    whole = torch.where(has_top_k, limited.sum(-1, keepdim=True), mass[:, None])
    above = limited.cumsum(-1) - limited  # the weight of all candidates before this one
    num_needed = (above < filters.top_p[:, None] * whole).sum(-1, keepdim=True).clamp(min=1)
    in_top_p = (filters.top_p >= 1.0)[:, None] | (values >= values.gather(1, num_needed - 1))
    kept = in_top_k & in_top_p & _in_min_p(values, values[:, 0], filters)
    # When top_k may reach past the candidates, `whole` is too small and top_p would cut too early.
    is_cut_short = has_top_k & in_top_k.all(-1, keepdim=True) & (width < vocab_size)
    return kept | is_cut_short


def _in_min_p(logits: Tensor, peak: Tensor, filters: Filters) -> Tensor:
    """bool [n, m]: p >= min_p · p_max, which is depth <= -log(min_p)."""
    return _depth(logits, peak, filters.temperature) <= -filters.min_p.log()[:, None]


def _draw_wide(logits: Tensor, peak: Tensor, filters: Filters, bits: Bits) -> Tensor:
    """`draw_filtered` for rows that keep more tokens than there are candidates."""
    weights = weigh(logits, peak, filters.temperature)
    weights.masked_fill_(logits < _top_k_threshold(logits, filters.top_k)[:, None], 0)
    too_low = logits < _top_p_threshold(logits, weights, peak, filters)[:, None]
    weights.masked_fill_(too_low.logical_or_(~_in_min_p(logits, peak, filters)), 0)
    return _draw_by_weight(weights, bits)


def _top_k_threshold(logits: Tensor, top_k: Tensor) -> Tensor:
    """[n] the top_k-th largest logit of each row, -inf without top_k."""
    vocab_size = logits.shape[1]
    thresholds = torch.full_like(logits[:, 0], -torch.inf)
    for row, k in enumerate(top_k.tolist()):
        if k < vocab_size:
            thresholds[row] = logits[row].kthvalue(vocab_size + 1 - k).values
    return thresholds


def _top_p_threshold(logits: Tensor, weights: Tensor, peak: Tensor, filters: Filters) -> Tensor:
    """[n] the smallest logit that top_p keeps, -inf without top_p: a token stays when less than top_p is above it."""
    bins = _depth(logits, peak, filters.temperature).mul_(_NUM_BINS / _SPAN).clamp_(max=_NUM_BINS - 1).to(torch.int64)
    histogram = torch.zeros(len(logits), _NUM_BINS, dtype=torch.int64, device=logits.device)
    ends = histogram.scatter_add_(1, bins, weights).cumsum(-1)
    needed = filters.top_p * ends[:, -1]
    crossing = torch.searchsorted(ends.double(), needed[:, None])[:, 0]  # the first bin that ends at `needed` or more
    thresholds = torch.full_like(peak, -torch.inf)
    for row in (filters.top_p < 1.0).nonzero()[:, 0].tolist():
        members = bins[row] == crossing[row]
        values, order = logits[row][members].sort(descending=True)
        inside = weights[row][members][order]
        above = ends[row, crossing[row]] - inside.sum() + inside.cumsum(0) - inside
        thresholds[row] = values[int((above < needed[row]).sum().clamp(min=1)) - 1]
    return thresholds


def _draw_by_weight(weights: Tensor, bits: Bits) -> Tensor:
    """[n] ids, each with probability weight / total, the running sum taken over blocks first, then inside one.

    weights int64 [n, vocab_size].
    """
    padding = -weights.shape[1] % _BLOCK
    blocks = torch.nn.functional.pad(weights, (0, padding)).unflatten(1, (-1, _BLOCK))  # [n, num_blocks, BLOCK]
    ends = blocks.sum(-1).cumsum(-1)  # [n, num_blocks]
    target = _targets(ends, bits)
    block = torch.searchsorted(ends, target, right=True)  # [n, 1]
    inside = blocks[torch.arange(len(blocks), device=weights.device), block[:, 0]]  # [n, BLOCK]
    target -= ends.gather(1, block) - inside.sum(-1, keepdim=True)
    offset = torch.searchsorted(inside.cumsum(-1), target, right=True)
    return (block * _BLOCK + offset)[:, 0]


def _first_above(ends: Tensor, bits: Bits) -> Tensor:
    """[n, 1] the first place where the running sum `ends` [n, m] exceeds bits · total / 2^64."""
    return torch.searchsorted(ends, _targets(ends, bits), right=True)


def _targets(ends: Tensor, bits: Bits) -> Tensor:
    """int64 [n, 1] uniform over [0, total), with the totals in the last column of `ends`."""
    below = scale_below(bits, ends[:, -1].tolist())
    return torch.tensor(below, dtype=torch.int64, device=ends.device)[:, None]
