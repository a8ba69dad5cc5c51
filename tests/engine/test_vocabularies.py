"""Requests of different vocabularies in one batch: each row is what it would be alone, with its own ids only."""

from pathlib import Path
from typing import Any

import pytest
import torch

from server.engine.device_sampler import samples_on_device
from server.engine.request import Request, SampledToken, SamplingParams
from server.engine.sampler import Sampler
from server.errors import BadRequest
from tests.equivalence.architectures import VOCAB, save
from tests.equivalence.harness import EngineHarness, Squeeze

WIDTH, DEFAULT = 700, 600
SIZES = (None, 500, 700, 601, None, 40, 600)
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "logprobs": 5},
    {"temperature": 0.0, "repetition_penalty": 1.3, "logit_bias": {5: 3.0}},
    {"temperature": 1.0},
    {"temperature": 2.0, "logprobs": 20},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.0, "top_k": 550},
    {"temperature": 1.5, "top_p": 0.9},
    {"temperature": 3.0, "top_p": 0.99, "min_p": 0.001},
    {"temperature": 1.0, "min_p": 0.05, "presence_penalty": 1.0},
]


def request(size: int | None, at: int, params: dict[str, Any]) -> Request:
    return Request(
        request_id=f"{size}-{at}",
        prompt_token_ids=(1, 2, 3),
        sampling_params=SamplingParams(seed=at, **params),
        num_token_ids=size,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_what_it_is_alone(dtype: torch.dtype) -> None:
    rows = [(size, params) for size in SIZES for params in PARAMS]
    logits = (torch.randn(len(rows), WIDTH, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    requests = [request(size, at, params) for at, (size, params) in enumerate(rows)]
    before = logits.clone()
    together = Sampler(WIDTH, allowed_size=DEFAULT).sample(logits, requests)
    assert torch.equal(logits, before)
    seen = set()
    for at, (size, _) in enumerate(rows):
        own = DEFAULT if size is None else size
        alone = Sampler(own).sample(logits[at : at + 1, :own].clone(), [request(None, at, rows[at][1])])
        assert together[at] == alone[0]
        token = together[at]
        assert isinstance(token, SampledToken) and token.token_id < own
        if token.logprob is not None:
            assert all(token_id < own for token_id, _ in token.logprob.top)
        seen.add(token.token_id)
    assert len(seen) > len(SIZES)


def test_ids_beyond_the_default_can_be_chosen_by_whom_they_belong_to() -> None:
    logits = torch.zeros(3, WIDTH)
    logits[:, 650] = 9.0
    logits[:, 550] = 5.0
    logits[:, 450] = 2.0
    requests = [request(size, at, {"temperature": 0.0}) for at, size in enumerate((None, 700, 500))]
    sampled = Sampler(WIDTH, allowed_size=DEFAULT).sample(logits, requests)
    assert [token and token.token_id for token in sampled] == [550, 650, 450]


def test_a_row_of_nothing_finite_ends_alone() -> None:
    logits = torch.zeros(3, WIDTH)
    logits[1, 550] = torch.nan
    sampler = Sampler(WIDTH, allowed_size=DEFAULT)
    requests = [request(size, at, {"temperature": 0.0}) for at, size in enumerate((500, 700, None))]
    assert [token is None for token in sampler.sample(logits, requests)] == [False, True, False]
    logits[0, 600] = logits[2, 650] = torch.inf  # past what these two have
    assert [token is None for token in sampler.sample(logits, requests)] == [False, True, False]


def test_prompt_logprobs_are_over_its_own_vocabulary() -> None:
    logits = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(2))
    for size in (None, 500, 700):
        asked = request(size, 0, {"prompt_logprobs": 3})
        found = Sampler(WIDTH, allowed_size=DEFAULT).prompt_logprobs(logits, [1, 2, 3, 4], asked)
        expected = logits[:, : size or DEFAULT].log_softmax(-1)
        assert [each.logprob for each in found] == pytest.approx([float(expected[at, at + 1]) for at in range(4)])


def test_the_device_samples_only_the_engines_own_vocabulary() -> None:
    assert samples_on_device(request(None, 0, {"temperature": 0.0}))
    assert not samples_on_device(request(500, 0, {"temperature": 0.0}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_the_engine(dtype: str, tmp_path: Path) -> None:
    """A row of fewer ids beside rows of the default number: the same logits, other tokens, and prompts checked."""
    base = save("llama", tmp_path / "base")
    prompt = [5, 9, 30, 12, 44]
    harness = EngineHarness.open(base, dtype, Squeeze(), num_token_ids=120)

    def add(name: str, size: int | None, prompt: list[int] = prompt, **sampling: Any) -> None:
        added = harness.add(name, prompt, num_token_ids=size, max_tokens=24, **sampling)
        assert added.num_token_ids == size

    sizes = {"default": None, "few": 50, "all": VOCAB, "tiny": 46}
    for name, size in sizes.items():
        add(name, size, temperature=2.0, seed=3)
        add(f"greedy {name}", size)
    harness.run()
    for name, size in sizes.items():
        for each in (name, f"greedy {name}"):
            tokens, own = harness.tokens(each), size or 120
            assert len(tokens) == 24 and max(tokens) < own
            if each.startswith("greedy"):
                assert tokens == harness.chosen_logits(each)[:, :own].argmax(-1).tolist()
    assert max(harness.tokens("default")) >= 50 and max(harness.tokens("all")) >= 120
    assert harness.tokens("greedy tiny") != harness.tokens("greedy all")
    for name, size, ids in (("a", 50, [50]), ("b", None, [120]), ("c", VOCAB, [VOCAB])):
        with pytest.raises(BadRequest, match=r"outside \[0,"):
            add(name, size, ids)
        del harness.requests[name]
    add("ok", VOCAB, [121, 127])
    harness.run()
