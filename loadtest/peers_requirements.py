"""What must hold: ratios of medians taken in one run, each with its bound. Knows no server and writes no table."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loadtest.peers_bytes import Bandwidth, StepBytes
from loadtest.peers_endpoints import LLAMA_CPP, OURS, PEERS, PEFT, VLLM
from loadtest.peers_measure import Measured
from loadtest.peers_rounds import Results

Figure = Callable[[Measured], float]

_GIB = 1 << 30

ETA_ROWS = (8, 32)  # rows of a decode step, each with an adapter of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirement:
    """`value` None: not measured in this run. `bound` is the least, or with `at_most` the most. `fell_short`: what the
    value was to be measured under was not reached, so it is missed, whatever the value.
    """

    what: str
    bound: float
    value: float | None
    at_most: bool = False
    note: str = ""
    fell_short: bool = False

    @property
    def held(self) -> bool | None:
        if self.value is None:
            return None
        if self.fell_short:
            return False
        return self.value <= self.bound if self.at_most else self.value >= self.bound


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeLimit:
    """A pair of decode waves beside the byte limit."""

    rows: int
    base_rate: float  # tokens/s
    lora_rate: float
    mean_context: float
    phi: float
    rho_base: float
    rho_lora: float

    @property
    def eta(self) -> float:
        return self.lora_rate / self.base_rate


def rate(measured: Measured) -> float:
    return measured.figures.output_tokens_per_second


def first_token_ms(measured: Measured) -> float:
    return measured.figures.ttft_ms.p50


def median(found: Sequence[Measured], figure: Figure) -> float | None:
    return statistics.median(figure(each) for each in found) if found else None


def decode_limit(results: Results, rows: int, step_bytes: StepBytes, bandwidth: Bandwidth | None) -> DecodeLimit | None:
    lora, base = _decodes(results, rows, "over"), _decodes(results, rows, "under")
    if lora is None or base is None or bandwidth is None:
        return None
    (lora_rate, context), (base_rate, _) = lora, base

    def rho(tokens_per_second: float, adapters: int) -> float:
        floor = step_bytes.step(rows=rows, context=context, adapters=adapters) / bandwidth.read
        return floor / (rows / tokens_per_second)

    return DecodeLimit(
        rows=rows,
        base_rate=base_rate,
        lora_rate=lora_rate,
        mean_context=context,
        phi=step_bytes.phi(rows=rows, context=context, adapters=rows),
        rho_base=rho(base_rate, 0),
        rho_lora=rho(lora_rate, rows),
    )


def _decodes(results: Results, rows: int, side: str) -> tuple[float, float] | None:
    """Medians of tokens/s and of the context, of the waves in which all rows decoded together."""
    found = [each.decode for each in results.pairs.get((f"eta-{rows}", side), []) if each.decode is not None]
    if not found:
        return None
    rates, contexts = [each.tokens_per_second for each in found], [each.mean_context for each in found]
    return statistics.median(rates), statistics.median(contexts)


def requirements(results: Results, limits: Sequence[DecodeLimit]) -> list[Requirement]:
    """Every row of the table of what must hold."""
    return [
        _over_best(results, "8x32", "output tok/s, 8 in flight over 32 adapters", 3.0),
        _over_best(results, "32x32", "output tok/s, 32 in flight over 32 adapters", 5.0),
        _over_best(results, "32xbase", "output tok/s, base only, 32 in flight", 1.5),
        _over(results, "1xbase", LLAMA_CPP, "output tok/s, base only, 1 in flight", 0.5),
        _over(results, "1xbase", VLLM, "output tok/s, base only, 1 in flight", 1.5),
        _first_token(results),
        *(_eta(limits, rows) for rows in ETA_ROWS),
        _pair(results, "many", "tok/s with 1,000 registered adapters (zipf 1) over 5", 0.90),
        _pair(results, "base-loaded", "base-only traffic, adapters loaded over none", 0.98),
        _over(results, "32x32", PEFT, "output tok/s, 32 in flight over 32 adapters", 6.0),
        _pair(results, "mixed", "8 adapters in one batch over the same 8 one after the other", 3.5),
        _memory(results),
    ]


def _memory(results: Results) -> Requirement:
    """The most that any of our servers had at the end of any load."""
    measured = [each for found in (*results.cells.values(), *results.pairs.values()) for each in found]
    proofs = [each.figures.proof for each in measured if each.figures.proof is not None]
    over = [proof.memory_over / _GIB for proof in proofs if proof.memory_over is not None]
    what = "resident memory over weights, KV, pools and loaded adapters, GiB"
    return Requirement(what=what, bound=1.0, value=max(over, default=None), at_most=True)


def _eta(limits: Sequence[DecodeLimit], rows: int) -> Requirement:
    what = f"eta/phi (LoRA over base, divided by the byte limit), decode, D = {rows}"
    limit = next((each for each in limits if each.rows == rows), None)
    if limit is None:
        return Requirement(what=what, bound=0.80, value=None)
    note = f"eta {limit.eta:.3f}, phi {limit.phi:.3f}, rho {limit.rho_lora:.2f} (base {limit.rho_base:.2f})"
    return Requirement(what=what, bound=0.80, value=limit.eta / limit.phi, note=note)


def _ours(results: Results, cell: str, figure: Figure) -> float | None:
    return median(results.cells.get((cell, OURS), []), figure)


def _peers(results: Results, cell: str, figure: Figure) -> dict[str, float]:
    found = {name: median(results.cells.get((cell, name), []), figure) for name in PEERS}
    return {name: value for name, value in found.items() if value is not None}


def _over_best(results: Results, cell: str, what: str, bound: float) -> Requirement:
    ours, peers = _ours(results, cell, rate), _peers(results, cell, rate)
    best = max(peers, key=lambda name: peers[name], default=None)
    value = None if best is None or ours is None else ours / peers[best]
    return Requirement(what=f"{what}, over the best peer", bound=bound, value=value, note=best or "")


def _over(results: Results, cell: str, peer: str, what: str, bound: float) -> Requirement:
    ours, theirs = _ours(results, cell, rate), _peers(results, cell, rate).get(peer)
    value = None if ours is None or theirs is None else ours / theirs
    return Requirement(what=f"{what}, over {peer}", bound=bound, value=value)


def _first_token(results: Results) -> Requirement:
    ours, peers = _ours(results, "32x32", first_token_ms), _peers(results, "32x32", first_token_ms)
    best = min(peers, key=lambda name: peers[name], default=None)
    value = None if best is None or ours is None else ours / peers[best]
    what = "median TTFT, 32 in flight over 32 adapters, over the best peer"
    return Requirement(what=what, bound=0.25, value=value, at_most=True, note=best or "")


def _pair(results: Results, name: str, what: str, bound: float) -> Requirement:
    over, under = (median(results.pairs.get((name, side), []), rate) for side in ("over", "under"))
    value = None if over is None or under is None else over / under
    distinct = [_adapters_per_step(results, name, side) for side in ("over", "under")]
    note = f"{distinct[0]:.1f} adapters a step over {distinct[1]:.1f}" if any(distinct) else ""
    return Requirement(what=what, bound=bound, value=value, note=note)


def _adapters_per_step(results: Results, name: str, side: str) -> float:
    """The mean over what was proven, 0 when nothing was."""
    proofs = [each.figures.proof for each in results.pairs.get((name, side), [])]
    found = [proof.adapters_per_step for proof in proofs if proof is not None]
    return statistics.mean(found) if found else 0.0
