"""The sampler against a slow oracle: one row at a time, a full sort, Python's own whole numbers."""

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from server.engine import sampling_filters
from server.engine.random_draw import random_bits, scale_below
from server.engine.request import Request, SampledToken, SamplingParams
from server.engine.sampler import Sampler
from server.engine.top_candidates import top_candidates

VOCAB = 1500

_request_number = iter(range(10**9))


def make_request(
    prompt: Sequence[int] = (), output: Sequence[int] = (), stop_ids: Sequence[int] = (), **params: Any
) -> Request:
    return Request(
        request_id=f"request-{next(_request_number)}",
        prompt_token_ids=tuple(prompt),
        sampling_params=SamplingParams(**params),
        stop_ids=frozenset(stop_ids),
        output_token_ids=list(output),
    )


def random_logits(rows: int, *, seed: int, spread: float = 3.0, dtype: torch.dtype = torch.float32) -> Tensor:
    logits = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread
    return logits.to(dtype)


def only_ids(sampled: Sequence[SampledToken | None]) -> list[int | None]:
    return [None if token is None else token.token_id for token in sampled]


# The oracle: nothing shared with the code under test but the hash.


def oracle_logits(row: Tensor, request: Request) -> list[float]:
    """Penalties, bias and mask, one token at a time, in float32 as the field does it."""
    params, logits = request.sampling_params, row.float().numpy().copy()
    counts = Counter(request.output_token_ids)
    for token in {*request.prompt_token_ids, *counts}:
        penalty = np.float32(params.repetition_penalty)
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        logits[token] -= np.float32(params.frequency_penalty) * np.float32(counts[token])
        logits[token] -= np.float32(params.presence_penalty) * np.float32(counts[token] > 0)
    for token, bias in params.logit_bias.items():
        logits[token] += np.float32(bias)
    if len(request.output_token_ids) < params.min_tokens:
        logits[list(request.stop_ids)] = -np.inf
    return [float(value) for value in logits]


def oracle_kept(logits: Sequence[float], params: SamplingParams) -> list[int]:
    """The ids a draw may choose: sort everything, apply the definitions in float64, keep ties together."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    largest = logits[order[0]]
    probability = [math.exp((value - largest) / params.temperature) for value in logits]
    if params.top_k is not None:
        order = [i for i in order if logits[i] >= logits[order[min(params.top_k, len(order)) - 1]]]
    whole, above, threshold = sum(probability[i] for i in order), 0.0, largest
    for i in order:
        if above >= params.top_p * whole:
            break
        above += probability[i]
        threshold = logits[i]
    if params.top_p < 1.0:
        order = [i for i in order if logits[i] >= threshold]
    return sorted(i for i in order if probability[i] >= params.min_p)


def oracle_token(row: Tensor, request: Request) -> int:
    logits, params = oracle_logits(row, request), request.sampling_params
    if params.is_greedy:
        return logits.index(max(logits))
    kept = oracle_kept(logits, params)
    weights = [math.exp((logits[i] - max(logits)) / params.temperature) for i in kept]
    uniform = int(random_bits([params.seed], [len(request.output_token_ids)])[0]) / 2**64
    target, running = uniform * sum(weights), 0.0
    for token, weight in zip(kept, weights, strict=True):
        running += weight
        if running > target:
            return token
    return kept[-1]


def random_params(rng: random.Random) -> dict[str, Any]:
    return {
        "temperature": rng.choice([0.0, 0.1, 0.7, 1.0, 1.0, 2.5]),
        "top_p": rng.choice([1.0, 1.0, 0.9, 0.5, 0.05, 0.999]),
        "top_k": rng.choice([None, None, 1, 7, 50, 255, 256, 700, VOCAB, 10 * VOCAB]),
        "min_p": rng.choice([0.0, 0.0, 0.02, 0.5, 1.0]),
        "presence_penalty": rng.choice([0.0, 0.0, 1.5, -2.0]),
        "frequency_penalty": rng.choice([0.0, 0.0, 0.7, -0.3]),
        "repetition_penalty": rng.choice([1.0, 1.0, 1.3, 0.8]),
        "logit_bias": rng.choice([{}, {}, {3: 100.0}, {5: -100.0, VOCAB - 1: 2.0}]),
        "min_tokens": rng.choice([0, 0, 4]),
        "seed": rng.getrandbits(64),
    }


def random_request(rng: random.Random) -> Request:
    prompt = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 200))]
    output = [rng.randrange(VOCAB) for _ in range(rng.randrange(9))]
    return make_request(prompt, output, stop_ids=[rng.randrange(VOCAB), 3], **random_params(rng))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # bf16 has many ties
def test_random_batches_agree_with_the_oracle(seed: int, dtype: torch.dtype) -> None:
    rng = random.Random(seed)
    requests = [random_request(rng) for _ in range(24)]
    logits = random_logits(24, seed=seed, spread=rng.choice([0.5, 3.0, 8.0]), dtype=dtype)
    sampled = only_ids(Sampler(VOCAB).sample(logits, requests))
    assert sampled == [oracle_token(row, request) for row, request in zip(logits, requests, strict=True)]


EDGE_ROWS = {
    "all equal": torch.zeros(VOCAB),
    "two values": torch.arange(VOCAB).remainder(2) * 1.5,
    "one token": torch.full((VOCAB,), -torch.inf).index_fill(0, torch.tensor([VOCAB - 1]), 2.0),
    "huge": torch.linspace(-1.0, 1.0, VOCAB) * 3e38,
    "steep": torch.linspace(-500.0, 500.0, VOCAB),
    "half masked": torch.where(torch.arange(VOCAB) % 2 == 0, torch.tensor(-torch.inf), torch.tensor(0.25)),
}


@pytest.mark.parametrize("name", EDGE_ROWS)
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_p": 0.3},
        {"temperature": 1.0, "top_k": 9},
        {"temperature": 1.0, "top_k": 400, "top_p": 0.7, "min_p": 0.1},
        {"temperature": 0.01, "min_p": 0.5},
    ],
)
def test_extreme_rows_agree_with_the_oracle(name: str, params: dict[str, Any]) -> None:
    requests = [make_request(seed=seed, **params) for seed in range(20)]
    logits = EDGE_ROWS[name].expand(20, VOCAB)
    if name == "huge":  # differences beyond float32: only the largest can have weight
        assert set(only_ids(Sampler(VOCAB).sample(logits, requests))) == {VOCAB - 1}
        return
    expected = [oracle_token(row, request) for row, request in zip(logits, requests, strict=True)]
    assert only_ids(Sampler(VOCAB).sample(logits, requests)) == expected


def test_tiny_temperature_is_greedy() -> None:
    logits = random_logits(4, seed=5)
    requests = [make_request(temperature=10.0**-n) for n in (8, 20, 45, 300)]
    assert only_ids(Sampler(VOCAB).sample(logits, requests)) == logits.argmax(-1).tolist()


def test_a_row_does_not_depend_on_its_batch() -> None:
    """Alone, in any order, beside other rows, over several steps: the same request draws the same token."""
    rng = random.Random(7)
    requests = [random_request(rng) for _ in range(16)]
    logits = random_logits(16, seed=7, dtype=torch.bfloat16)
    whole = only_ids(Sampler(VOCAB).sample(logits, requests))
    alone = [only_ids(Sampler(VOCAB).sample(logits[i : i + 1], [requests[i]]))[0] for i in range(16)]
    assert alone == whole
    sampler = Sampler(VOCAB)
    for _ in range(10):
        chosen = rng.sample(range(16), rng.randrange(1, 16))
        batch = only_ids(sampler.sample(logits[chosen], [requests[i] for i in chosen]))
        assert batch == [whole[i] for i in chosen]


def test_weights_are_the_same_bits_in_any_batch() -> None:
    logits = random_logits(9, seed=8)
    temperature = torch.linspace(0.3, 2.0, 9)
    whole = sampling_filters.weigh(logits, logits.amax(-1), temperature)
    for i in range(9):
        row = logits[i : i + 1].clone()
        assert torch.equal(sampling_filters.weigh(row, row.amax(-1), temperature[i : i + 1])[0], whole[i])


def test_both_ways_of_filtering_give_the_same_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few candidates push rows to selection and histogram; the outcome must not notice."""
    rng = random.Random(11)
    logits = random_logits(40, seed=11, spread=1.5, dtype=torch.bfloat16)
    requests = [
        make_request(
            seed=i, temperature=rng.choice([0.5, 1.3]), top_p=rng.choice([1.0, 0.8, 0.99]),
            top_k=rng.choice([None, 20, 600]), min_p=rng.choice([0.0, 0.01]),
        )
        for i in range(40)
    ]  # fmt: skip
    outcomes = []
    for num_candidates in (1, 8, 64, 256, VOCAB):
        monkeypatch.setattr(sampling_filters, "_NUM_CANDIDATES", num_candidates)
        outcomes.append(only_ids(Sampler(VOCAB).sample(logits, requests)))
    assert all(outcome == outcomes[0] for outcome in outcomes)


def test_penalty_counts_follow_a_request_through_its_life() -> None:
    """Counts are kept between steps; a fresh sampler, which must rebuild them, agrees at every step."""
    request = make_request(
        [1, 2, 3], temperature=0.0, frequency_penalty=0.9, presence_penalty=0.4, repetition_penalty=1.2
    )
    sampler, row = Sampler(VOCAB), random_logits(1, seed=3)
    for _ in range(30):
        [token] = only_ids(sampler.sample(row, [request]))
        assert token == only_ids(Sampler(VOCAB).sample(row, [request]))[0] == oracle_token(row[0], request)
        assert token is not None
        request.output_token_ids.append(token)
    assert len(set(request.output_token_ids)) > 5
    sampler.forget(request.request_id)
    sampler.forget("never seen")
    assert sampler._processors._counts == {}


def test_min_tokens_holds_stop_ids_back_until_enough_are_out() -> None:
    row = torch.zeros(1, VOCAB)
    row[0, 9], row[0, 4] = 8.0, 5.0
    request = make_request(stop_ids=[9], temperature=0.0, min_tokens=2)
    sampler = Sampler(VOCAB)
    tokens = []
    for _ in range(3):
        tokens += only_ids(sampler.sample(row, [request]))
        request.output_token_ids.append(4)
    assert tokens == [4, 4, 9]


def test_ids_outside_the_vocabulary_touch_no_other_row() -> None:
    logits = random_logits(2, seed=1)
    wild = make_request(
        [VOCAB + 5, -1],
        stop_ids=[VOCAB],
        temperature=0.0,
        min_tokens=3,
        repetition_penalty=2.0,
        logit_bias={VOCAB: 1e6},
    )
    plain = make_request(temperature=0.0)
    assert only_ids(Sampler(VOCAB).sample(logits, [wild, plain])) == logits.argmax(-1).tolist()


def test_padding_of_the_vocabulary_is_never_chosen_nor_counted() -> None:
    logits = random_logits(3, seed=2)
    logits[:, 1000:] = 50.0
    requests = [make_request(temperature=0.0, logprobs=2), make_request(seed=1), make_request(seed=1, top_p=0.9)]
    narrow = Sampler(VOCAB, allowed_size=1000)
    sampled = narrow.sample(logits, requests)
    assert sampled == Sampler(1000).sample(logits[:, :1000], requests)
    assert all(token is not None and token.token_id < 1000 for token in sampled)
    expected = logits[:, :1000].log_softmax(-1)[torch.arange(3), torch.tensor([1, 2, 3])].tolist()
    assert [
        entry.logprob for entry in narrow.prompt_logprobs(logits, [1, 2, 3], make_request(prompt_logprobs=0))
    ] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_p": 0.5}, {"presence_penalty": 1.0, "logprobs": 3}])
def test_a_broken_row_fails_alone(poison: float, params: dict[str, Any]) -> None:
    rng = random.Random(1)
    requests = [random_request(rng), make_request([1], [2], **params), random_request(rng)]
    logits = random_logits(3, seed=4)
    if math.isinf(poison) and poison < 0:
        logits[1] = poison
    else:
        logits[1, 77] = poison
    sampled = only_ids(Sampler(VOCAB).sample(logits, requests))
    assert sampled == [oracle_token(logits[0], requests[0]), None, oracle_token(logits[2], requests[2])]


def test_logits_are_left_as_they_were() -> None:
    """The engine reads prompt logprobs from the same tensor afterwards."""
    logits = random_logits(3, seed=6)
    before = logits.clone()
    biased = {"logit_bias": {1: 50.0}, "repetition_penalty": 2.0}
    Sampler(VOCAB).sample(
        logits, [make_request([1, 2], **biased), make_request(top_k=3), make_request(temperature=0.0)]
    )
    assert torch.equal(logits, before)


# transformers as the outside oracle of the filtered distribution.


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 40},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 1.2, "min_p": 0.05},
        {"temperature": 0.9, "top_k": 300, "top_p": 0.95, "min_p": 0.001},
        {"temperature": 0.9, "top_p": 0.8, "repetition_penalty": 1.5},
    ],
)
def test_the_drawn_tokens_are_those_transformers_keeps(params: dict[str, Any]) -> None:
    """3000 draws fall on transformers' support only, and as often as its probabilities say (see `assert_fits`)."""
    row, prompt = random_logits(1, seed=12), [5, 6, 7, 8]
    scores = row.clone()
    ids = torch.tensor([prompt])
    if "repetition_penalty" in params:
        scores = RepetitionPenaltyLogitsProcessor(params["repetition_penalty"])(ids, scores)
    scores = TemperatureLogitsWarper(params["temperature"])(ids, scores)
    if "top_k" in params:
        scores = TopKLogitsWarper(params["top_k"])(ids, scores)
    if "top_p" in params:
        scores = TopPLogitsWarper(params["top_p"])(ids, scores)
    if "min_p" in params:
        scores = MinPLogitsWarper(params["min_p"])(ids, scores)
    expected = scores.softmax(-1)[0].double()
    sampler, tokens = Sampler(VOCAB), []
    for begin in range(0, 3000, 100):
        requests = [make_request(prompt, seed=begin + i, **params) for i in range(100)]
        tokens += only_ids(sampler.sample(row.expand(100, VOCAB), requests))
    drawn = torch.bincount(torch.tensor(tokens), minlength=VOCAB)
    assert drawn[expected == 0].sum() == 0
    assert_fits(drawn, expected)


def assert_fits(drawn: Tensor, expected: Tensor) -> None:
    """Chi-square at a false-alarm probability of 1e-6, rare tokens pooled so that each cell expects 5 or more.

    The quantile is Wilson and Hilferty's: chi2 = f · (1 - 2/(9f) + z · sqrt(2/(9f)))^3 with z = 4.753 for 1e-6.
    """
    total = int(drawn.sum())
    order = expected.argsort(descending=True)
    want, got = (expected[order] * total).tolist(), drawn[order].tolist()
    cells: list[tuple[float, int]] = [(0.0, 0)]
    for w, g in zip(want, got, strict=True):
        cells[-1] = (cells[-1][0] + w, cells[-1][1] + g)
        if cells[-1][0] >= 5:
            cells.append((0.0, 0))
    last = cells.pop()
    cells[-1] = (cells[-1][0] + last[0], cells[-1][1] + last[1])
    statistic = sum((g - w) ** 2 / w for w, g in cells)
    freedom = len(cells) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 4.753 * math.sqrt(2 / (9 * freedom))) ** 3
    assert freedom >= 2 and statistic < limit, (statistic, limit)


# The random numbers.


def test_the_hash_is_splitmix64() -> None:
    """The first outputs of SplitMix64 from state 0, as its authors' code prints them (mix(0) is 0)."""
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert random_bits([0, 0, 0], [0, 1, 2]).tolist() == expected


def test_seeds_are_any_integers() -> None:
    assert random_bits([-1, 2**64 + 3], [0, 0]).tolist() == random_bits([2**64 - 1, 3], [0, 0]).tolist()


@pytest.mark.parametrize("along", ["indices", "seeds", "both"])
def test_bits_are_uniform_and_neighbours_are_independent(along: str) -> None:
    """2^16 numbers along one seed, along one index, and along the diagonal: high and low bits, alone and in pairs."""
    count = range(1 << 16)
    zeros = [0] * len(count)
    bits = random_bits(zeros if along == "indices" else count, zeros if along == "seeds" else count)
    flat = torch.full((256,), 1 / 256, dtype=torch.float64)
    for shift in (56, 28, 0):
        byte = ((bits >> np.uint64(shift)) & np.uint64(255)).astype(np.int64)
        assert_fits(torch.bincount(torch.from_numpy(byte), minlength=256), flat)
        pairs = (byte[:-1:2] // 16) * 16 + byte[1::2] // 16
        assert_fits(torch.bincount(torch.from_numpy(pairs), minlength=256), flat)


def test_scaling_is_exact_at_the_ends() -> None:
    bits = np.array([0, 2**64 - 1, 2**63], np.uint64)
    assert scale_below(bits, [10, 10, 2**60]) == [0, 9, 2**59]


def test_other_seeds_and_other_steps_draw_other_tokens() -> None:
    row = torch.zeros(1, VOCAB)
    tokens: list[int | None] = []
    for seed in range(50):
        for step in range(20):
            tokens += only_ids(Sampler(VOCAB).sample(row, [make_request(output=[0] * step, seed=seed)]))
    # 1000 throws into 1500 cells leave 1500 · (1 - e^(-2/3)) = 730 hit, with a standard deviation of 13.
    assert abs(len(set(tokens)) - 730) < 6 * 13


# Logprobs and candidates.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_log_softmax_of_the_raw_logits(dtype: torch.dtype) -> None:
    logits = random_logits(6, seed=9, dtype=dtype)
    expected = logits.float().log_softmax(-1)
    wanted = [None, 0, 1, 5, 20, None]
    requests = [make_request([1, 2], seed=i, logprobs=n, repetition_penalty=1.4) for i, n in enumerate(wanted)]
    for i, token in enumerate(Sampler(VOCAB).sample(logits, requests)):
        assert token is not None
        if wanted[i] is None:
            assert token.logprob is None
            continue
        assert token.logprob is not None and token.logprob.token_id == token.token_id
        assert token.logprob.logprob == pytest.approx(float(expected[i, token.token_id]), abs=1e-5)
        best = sorted(range(VOCAB), key=lambda t, i=i: (-float(logits[i, t]), t))[: wanted[i]]  # type: ignore[misc]
        values = [value for _, value in token.logprob.top]
        assert values == pytest.approx([float(expected[i, t]) for t in best], abs=1e-5)
        for token_id, value in token.logprob.top:
            assert value == pytest.approx(float(expected[i, token_id]), abs=1e-5)


def test_the_greedy_token_leads_its_alternatives_even_when_tied() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [900, 40, 700]] = 3.0
    [token] = Sampler(VOCAB).sample(logits, [make_request(temperature=0.0, logprobs=3)])
    assert token is not None and token.logprob is not None
    assert [token_id for token_id, _ in token.logprob.top] == [40, 700, 900] and token.token_id == 40


def test_prompt_logprobs_of_many_positions() -> None:
    logits = random_logits(37, seed=10, dtype=torch.bfloat16)
    token_ids = [(i * 37) % VOCAB for i in range(37)]
    expected = logits.float().log_softmax(-1)
    found = Sampler(VOCAB).prompt_logprobs(logits, token_ids, make_request(prompt_logprobs=4))
    assert [entry.token_id for entry in found] == token_ids
    assert [entry.logprob for entry in found] == pytest.approx(
        [float(expected[i, t]) for i, t in enumerate(token_ids)], abs=1e-5
    )
    best = expected.topk(4).values
    for i, entry in enumerate(found):
        assert [value for _, value in entry.top] == pytest.approx(best[i].tolist(), abs=1e-5)
    assert Sampler(VOCAB).prompt_logprobs(logits[:0], [], make_request(prompt_logprobs=4)) == []


def candidate_shapes() -> Iterator[tuple[int, int]]:
    for vocab_size in (3, 50, 1500, 4096, 50257):
        for k in (1, 5, 256, 5000):
            yield vocab_size, k


@pytest.mark.parametrize(("vocab_size", "k"), list(candidate_shapes()))
def test_top_candidates_equal_topk(vocab_size: int, k: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(3, vocab_size, generator=torch.Generator().manual_seed(k)).to(dtype)
        values, ids = top_candidates(logits, k)
        assert torch.equal(values, logits.topk(min(k, vocab_size)).values)
        assert torch.equal(logits.gather(1, ids), values)
        assert all(len(set(row)) == len(row) for row in ids.tolist())
