"""What a request is: its tokens as one sequence, and the order of its statuses."""

import pytest

from server.engine.request import FinishReason, RequestStatus, SampledToken, SamplingParams
from tests.engine.fake_step import make_request


@pytest.mark.parametrize("begin", range(6))
@pytest.mark.parametrize("end", range(7))
def test_prompt_and_output_are_one_sequence(begin: int, end: int) -> None:
    request = make_request(prompt=(10, 11, 12))
    request.output_token_ids.extend([13, 14, 15])
    assert request.token_ids(begin, end) == [10, 11, 12, 13, 14, 15][begin:end]
    assert (request.num_prompt_tokens, request.num_output_tokens, request.num_tokens) == (3, 3, 6)


def test_exactly_the_statuses_after_preempted_are_finished_and_have_a_reason() -> None:
    finished = [status for status in RequestStatus if status.is_finished]
    assert finished == [status for status in RequestStatus if status.finish_reason is not None]
    assert finished == [status for status in RequestStatus if status.name.startswith("FINISHED_")]
    assert {status.finish_reason for status in finished} == set(FinishReason)


def test_greedy_is_temperature_0() -> None:
    assert SamplingParams(temperature=0.0).is_greedy
    assert not SamplingParams(temperature=0.1).is_greedy


def test_a_sampled_token_has_no_logprob_unless_asked_for() -> None:
    assert SampledToken(5).logprob is None
