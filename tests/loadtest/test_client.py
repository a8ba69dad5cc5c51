"""Events are found wherever the stream is cut, parsed only when they must be, failures counted or fatal as asked."""

import json

import pytest

from loadtest import client
from loadtest.client import LoadTestFailed, Target, by_model, send
from loadtest.run import run_once
from loadtest.sse import EventLines, is_plain_token
from loadtest.workload import Workload
from tests.loadtest.fake_server import FakeServer

_STREAM = b'data: {"a":1}\n\ndata: {"b":2}\r\n\r\n: comment\n\ndata:{"c":3}\n\ndata: [DONE]\n\n'


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_are_found_wherever_the_stream_is_cut(size: int) -> None:
    lines = EventLines()
    found = [payload for at in range(0, len(_STREAM), size) for payload in lines.feed(_STREAM[at : at + size])]
    assert found == [b'{"a":1}', b'{"b":2}', b'{"c":3}']


_CHOICE = {"index": 0, "text": " x", "finish_reason": None}
_USAGE = {"prompt_tokens": 1, "completion_tokens": 1}


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
@pytest.mark.parametrize(
    ("event", "plain"),
    [
        ({"choices": [_CHOICE]}, True),
        ({"choices": [_CHOICE], "usage": None}, True),
        ({"choices": [{**_CHOICE, "text": '"error": {"usage":{"choices":[]'}]}, True),
        ({"choices": [{**_CHOICE, "text": "\\"}]}, True),
        ({"choices": [_CHOICE], "usage": _USAGE}, False),
        ({"choices": [], "usage": _USAGE}, False),
        ({"choices": [], "text": '"choices": [{"'}, False),
        ({"error": {"message": "full"}}, False),
        ({"choices": [_CHOICE], "error": {"message": "lost"}}, False),
    ],
)
def test_only_an_event_with_nothing_but_a_choice_is_left_unparsed(
    event: dict, plain: bool, separators: tuple[str, str]
) -> None:
    assert is_plain_token(json.dumps(event, separators=separators).encode()) is plain


@pytest.mark.asyncio
@pytest.mark.parametrize("text", ["error", '"error": ', "[DONE]", "data: {}\n\n", '"usage":{'])
async def test_text_that_looks_like_the_wire_is_text(text: str) -> None:
    workload = Workload(models=("a",), num_requests=1, max_tokens=5)
    async with FakeServer(text=text).url() as url:
        (reply,) = await client.run(Target(url, by_model), workload)
    assert len(reply.arrivals) == reply.completion_tokens == 5


_REFUSED = Workload(models=("a", "b"), num_requests=12, max_tokens=3, in_flight=3)


@pytest.mark.asyncio
async def test_one_error_ends_the_run_unless_more_are_allowed() -> None:
    async with FakeServer(refuse_every=4, with_metrics=False).url() as url:
        with pytest.raises(ExceptionGroup) as raised:
            await send(Target(url, by_model), _REFUSED.calls(), 3)
    assert raised.group_contains(LoadTestFailed, match="429.*the queue is full")


@pytest.mark.asyncio
async def test_allowed_errors_are_counted_and_kept_out_of_the_times() -> None:
    server = FakeServer(refuse_every=4, with_metrics=False)
    async with server.url() as url:
        figures = await run_once(Target(url, by_model), _REFUSED, base=None, warm_up=False, max_errors=3)
    assert (figures.requests, figures.errors, figures.output_tokens) == (9, 3, 27)


@pytest.mark.asyncio
async def test_no_answer_at_all_is_a_failure() -> None:
    async with FakeServer(refuse_every=1, with_metrics=False).url() as url:
        with pytest.raises(LoadTestFailed, match="all 12 requests failed, the first with: request .* 429"):
            await run_once(Target(url, by_model), _REFUSED, base=None, warm_up=False, max_errors=12)


@pytest.mark.asyncio
@pytest.mark.parametrize(("keep_alive", "connections"), [(True, 1), (False, 6)])
async def test_connections_are_kept_unless_told_otherwise(keep_alive: bool, connections: int) -> None:
    server = FakeServer()
    async with server.url() as url:
        workload = Workload(models=("a",), num_requests=6, max_tokens=1, in_flight=1)
        await client.run(Target(url, by_model, keep_alive=keep_alive), workload)
    assert len(set(server.peers)) == connections
