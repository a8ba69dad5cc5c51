"""Tokens chosen on the device, without waiting, are those the Sampler chooses from the same logits and seeds."""

from random import Random

import pytest
import torch

from server.engine.device_sampler import DeviceSampler, _scale_below, samples_on_device
from server.engine.request import Request, SamplingParams
from server.engine.sampler import Sampler

CPU = torch.device("cpu")


def _request(i: int, random: Random) -> Request:
    params = SamplingParams(
        temperature=random.choice([0.0, 0.3, 1.0, 1e-7, 2.5]),
        top_p=random.choice([1.0, 1.0, 0.1, 0.9, 0.999]),
        top_k=random.choice([None, None, 1, 7, 400, 10_000]),
        min_p=random.choice([0.0, 0.0, 0.02, 0.5]),
        seed=random.randrange(-(2**40), 2**64),
    )
    request = Request(request_id=str(i), prompt_token_ids=(1,), sampling_params=params)
    request.output_token_ids = [5] * random.randrange(4)
    return request


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocab_size", "allowed"), [(11, 11), (700, 650), (5000, 5000)])
def test_equals_the_sampler(dtype: torch.dtype, vocab_size: int, allowed: int) -> None:
    random = Random(vocab_size)
    requests = [_request(i, random) for i in range(48)]
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (torch.randn(48, vocab_size, generator=generator) * 3).to(dtype)
    logits[7, 0], logits[8, :] = torch.nan, -torch.inf
    expected = Sampler(vocab_size, allowed_size=allowed).sample(logits, requests)
    sampler = DeviceSampler(allowed, 48, CPU)
    found = sampler.launch(logits, requests).read()
    assert found == [None if token is None else token.token_id for token in expected]
    assert found[7] is None and found[8] is None and len(set(found)) > 5
    assert sampler.last_ids.tolist() == [-1 if token_id is None else token_id for token_id in found]


def test_what_was_launched_before_keeps_its_tokens() -> None:
    sampler = DeviceSampler(4, 2, CPU)
    requests = [Request(request_id="r", prompt_token_ids=(1,), sampling_params=SamplingParams(temperature=0.0))]
    first = sampler.launch(torch.tensor([[0.0, 9.0, 1.0, 2.0]]), requests)
    second = sampler.launch(torch.tensor([[0.0, 1.0, 1.0, 2.0]]), requests)
    assert (first.read(), second.read(), sampler.last_ids.tolist()) == ([1], [3], [3, 0])


def test_targets_are_exact_up_to_the_largest_total() -> None:
    random = Random(0)
    bits = [0, (1 << 64) - 1, *(random.getrandbits(64) for _ in range(500))]
    totals = [(1 << 58) - 1, (1 << 58) - 1, *(random.getrandbits(random.randint(1, 58)) for _ in range(500))]
    low, high = torch.tensor([b & 0xFFFFFFFF for b in bits]), torch.tensor([b >> 32 for b in bits])
    found = _scale_below(low, high, torch.tensor(totals)).tolist()
    assert found == [(b * total) >> 64 for b, total in zip(bits, totals, strict=True)]
    assert max(found) == (1 << 58) - 2


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(temperature=0.0), True),
        (SamplingParams(top_p=0.5, top_k=3, min_p=0.1), True),
        (SamplingParams(logprobs=0), False),
        (SamplingParams(prompt_logprobs=0), False),
        (SamplingParams(frequency_penalty=0.1), False),
        (SamplingParams(logit_bias={1: 1.0}), False),
        (SamplingParams(min_tokens=1), False),
    ],
)
def test_which_requests_need_the_host(params: SamplingParams, expected: bool) -> None:
    request = Request(request_id="r", prompt_token_ids=(1,), sampling_params=params, stop_ids=frozenset({2}))
    assert samples_on_device(request) is expected
