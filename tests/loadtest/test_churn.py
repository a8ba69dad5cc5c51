"""What the churn makes of names, replies and counters, without a server: each way to be wrong is seen as what it is."""

import argparse
import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from loadtest import churn_command
from loadtest.churn_adapters import RANKS, linear_shapes, most_that_fit, pool_bytes
from loadtest.churn_client import Answer, Question, ask
from loadtest.churn_names import NameBook
from loadtest.churn_oracle import Oracle
from loadtest.churn_rest import COLD_READS, HITS, LEFT_DEVICE, LEFT_HOST, PREEMPTIONS, Watch
from loadtest.churn_verdict import Verdict

BASE = "base"
GONE = "model_not_found"
ORACLE = Oracle(
    ("p",),
    (),
    4,
    {("old", 0): [1, 2, 3, 4], ("new", 0): [5, 6, 7, 8], (None, 0): [9, 9, 9, 9], ("alike", 0): [1, 2, 0, 0]},
)


Reply = Callable[[web.Request], Awaitable[web.Response]]


@asynccontextmanager
async def serving(reply: Reply) -> AsyncIterator[aiohttp.ClientSession]:
    """A session with a server that replies so to everything."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", reply)
    async with TestServer(app) as server, aiohttp.ClientSession(server.make_url("/")) as session:
        yield session


class Clock:
    """Told what time it is."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def book_at(clock: Clock) -> NameBook:
    """sql is old from 1, is being replaced from 10 to 12, is new until it is deleted by an abort from 20 to 22."""
    book = NameBook(clock)
    for moment, change in (
        (1.0, lambda: (book.begin("sql", "old"), book.end("sql", "old"))),
        (10.0, lambda: book.begin("sql", "new")),
        (12.0, lambda: book.end("sql", "new")),
        (20.0, lambda: book.begin("sql", None, aborts=True)),
        (22.0, lambda: book.end("sql", None)),
    ):
        clock.now = moment
        change()
    return book


@pytest.mark.parametrize(
    ("since", "until", "versions"),
    [
        (2, 9, {"old"}),
        (2, 11, {"old", "new"}),
        (11, 11.5, {"old", "new"}),
        (12.5, 19, {"new"}),
        (13, 21, {"new", None}),
        (23, 30, {None}),
    ],
)
def test_a_name_may_be_what_it_was_while_the_request_was_on_its_way(
    since: float, until: float, versions: set[str | None]
) -> None:
    assert book_at(Clock()).may_be("sql", since, until) == versions


def test_an_alias_may_be_whatever_its_targets_may_be() -> None:
    clock = Clock()
    book = book_at(clock)
    clock.now = 30
    book.begin("law", "other")
    book.end("law", "other")
    book.begin_alias("main", ["sql"])
    book.end_alias("main", ["sql"])
    clock.now = 40
    book.begin_alias("main", ["law"])
    assert book.may_be("main", 41, 42) == {None, "other"}  # sql is deleted, law is not
    book.end_alias("main", ["law"])
    assert book.may_be("main", 43, 44) == {"other"} and book.aliased == {"law"}


def answer(tokens: list[int], **given: object) -> Answer:
    question = Question(str(given.pop("model", "sql")), 0, "p", 4, True)
    made = Answer(question, sent=2.0, headed=3.0, ended=4.0, status=200, version="old", token_ids=tokens)
    for name, value in given.items():
        setattr(made, name, value)
    return made


def cut(tokens: list[int], **given: object) -> Answer:
    """An answer that a delete with abort overlaps, and that is not whole."""
    return answer(tokens, **{"version": "new", "error": "cut", "sent": 15.0, "headed": 16.0, "ended": 21.0, **given})


@pytest.mark.parametrize(
    ("given", "counted"),
    [
        (answer([1, 2, 3, 4]), {"replies": 1, "tokens": 4}),
        (answer([1, 2, 7, 8]), {"replies": 1, "tokens": 4, "wrong_tokens": 2}),
        (answer([5, 6, 7, 8]), {"replies": 1, "tokens": 4, "wrong_tokens": 4}),
        (answer([5, 6, 7, 8], version="new"), {"replies": 1, "tokens": 4, "wrong_versions": 1}),
        (answer([5, 6, 7, 8], version="new", sent=9.0, headed=11.0), {"replies": 1, "tokens": 4}),
        (answer([9, 9, 9, 9], version=None), {"replies": 1, "tokens": 4, "wrong_versions": 1}),
        (answer([9, 9, 9, 9], version=None, sent=23.0, headed=24.0), {"replies": 1, "tokens": 4, "wrong_versions": 1}),
        (answer([9, 9, 9, 9], version=None, model=BASE), {"replies": 1, "tokens": 4}),
        (answer([1, 2, 3, 4], model=BASE), {"replies": 1, "tokens": 4, "wrong_versions": 1}),
        (answer([], status=404, error="404"), {"lost": 1}),
        (answer([], status=404, error="404", sent=19.0, headed=21.0), {"not_found": 1}),
        (answer([], status=404, error="404", model=BASE), {"lost": 1}),
        (answer([], status=503, error="503"), {"lost": 1}),
        (answer([1, 2], error="cut"), {"tokens": 2, "lost": 1}),
        (cut([5, 6], code=GONE), {"tokens": 2, "aborted": 1}),
        (cut([5, 2], code=GONE), {"tokens": 2, "aborted": 1, "wrong_tokens": 1}),
        (cut([], code=GONE), {"aborted": 1}),
        (cut([], code=GONE, status=404), {"aborted": 1}),
        (cut([5, 6], code=GONE, ended=19.0), {"tokens": 2, "lost": 1}),
        (cut([5, 6], code="engine_error"), {"tokens": 2, "lost": 1}),
        (cut([5, 6]), {"tokens": 2, "lost": 1}),
        (cut([], status=500, code="internal_error"), {"lost": 1}),
        (cut([], status=503, code=GONE), {"lost": 1}),
        (cut([], status=0), {"lost": 1}),
        (
            answer([1, 2, 3, 4], version="never seen"),
            {"replies": 1, "tokens": 4, "wrong_tokens": 4, "wrong_versions": 1},
        ),
    ],
)
def test_each_reply_is_counted_as_what_it_is(given: Answer, counted: dict[str, int]) -> None:
    verdict = Verdict()
    verdict.judge(given, book_at(Clock()), ORACLE, BASE)
    names = ("tokens", "replies", "not_found", "aborted", "wrong_tokens", "wrong_versions", "lost")
    assert {name: getattr(verdict, name) for name in names if getattr(verdict, name)} == counted
    bad = {"wrong_tokens", "wrong_versions", "lost"} & counted.keys()
    assert bool(verdict.examples) == bool(bad)


def test_an_example_says_whose_the_tokens_are() -> None:
    verdict = Verdict()
    verdict.judge(answer([5, 6, 7, 8]), book_at(Clock()), ORACLE, BASE)
    assert "got 4 wrong tokens, those of version new" in verdict.examples[0]


def watched(counted: dict[str, int], most: tuple[int, int]) -> Watch:
    """A watch of a run in which all that should happen did, but for `counted`; `most` stood in host and on device."""
    before = dict.fromkeys((PREEMPTIONS, HITS, LEFT_HOST, LEFT_DEVICE, COLD_READS), 5.0)
    since = {**dict.fromkeys(before, 9), PREEMPTIONS: 0, **counted}
    now = {name: before[name] + since[name] for name in before}
    return Watch(None, before, now, *most)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("counted", "most", "fault"),
    [
        ({}, (6, 8), None),
        ({PREEMPTIONS: 2}, (6, 4), "2 preemptions"),
        ({HITS: 0}, (6, 4), "no prefix was ever found again"),
        ({LEFT_DEVICE: 0}, (6, 4), "no evictions from the device, so its pools were not on trial"),
        ({LEFT_HOST: 0}, (6, 4), "no evictions from host memory, so host memory was not on trial"),
        ({COLD_READS: 0}, (6, 4), "no cold reads, so host memory was not on trial"),
        ({}, (7, 4), "7 adapters stood in host memory, which has room for 6"),
        ({}, (6, 9), "9 adapters stood on the device, where at most 8 fit"),
    ],
)
def test_what_would_make_a_run_prove_nothing_is_a_fault(
    counted: dict[str, int], most: tuple[int, int], fault: str | None
) -> None:
    found = watched(counted, most).faults(device_room=4, host_room=6, num_adapters=12)
    assert found == [] if fault is None else len(found) == 1 and fault in found[0]


def test_only_rooms_that_are_too_small_must_have_been_short() -> None:
    nothing = watched({LEFT_DEVICE: 0, LEFT_HOST: 0, COLD_READS: 0}, (12, 4))
    assert nothing.faults(device_room=12, host_room=None, num_adapters=12) == []
    assert nothing.faults(device_room=12, host_room=12, num_adapters=12) == []
    assert len(nothing.faults(device_room=4, host_room=None, num_adapters=12)) == 1
    assert len(nothing.faults(device_room=4, host_room=11, num_adapters=11)) == 2  # 12 stood in it, too


def test_counters_are_read_by_what_they_count() -> None:
    page = """
vllm:num_preemptions_total{engine="0"} 1
vllm:prefix_cache_hits_total{engine="0"} 2
loramux:adapter_evictions_total{model_name="m",tier="host"} 3
loramux:adapter_evictions_total{model_name="m",tier="device"} 4
loramux:adapter_cold_loads_total{model_name="m",result="loaded"} 5
loramux:adapter_cold_loads_total{model_name="m",result="failed"} 6
"""

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(text=page)

    async def begun() -> Watch:
        async with serving(metrics) as session:
            return await Watch.begin(session)

    assert asyncio.run(begun()).before == {PREEMPTIONS: 1, HITS: 2, LEFT_HOST: 3, LEFT_DEVICE: 4, COLD_READS: 5}


def test_rooms_hold_more_of_the_narrow_than_of_the_mean() -> None:
    assert most_that_fit(4) == 4 * 16 // min(RANKS) == 8


def test_rooms_and_kinds_come_from_the_command_line(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    churn_command.add_arguments(parser)
    settings = churn_command.settings_from(parser.parse_args(["--host-room", "0", "--kinds", "load,delete"]))
    assert (settings.num_tokens, settings.num_clients, settings.num_adapters) == (200_000, 16, 12)
    assert (settings.interval, settings.device_room, settings.host_room) == (0.03, 4, None)
    assert settings.kinds == ("load", "delete") and settings.num_sources > settings.num_adapters
    with pytest.raises(ValueError, match="--kinds explode: there are load"):
        churn_command.settings_from(parser.parse_args(["--kinds", "load,explode"]))


def test_the_pools_hold_four_of_the_mean_rank(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, '
        '"num_hidden_layers": 1}'
    )
    row = sum(map(sum, linear_shapes(tmp_path).values()))
    assert row == (64 + 64) * 2 + (64 + 32) * 2 + (64 + 128) * 3
    assert pool_bytes(tmp_path, 4, bytes_per_value=2) == 2 * row * sum(RANKS)


def asked(reply: Reply, *, is_stream: bool) -> Answer:
    """What a client makes of a server that replies so."""

    async def ask_it() -> Answer:
        async with serving(reply) as session:
            return await ask(session, Question("sql", 0, "p", 4, is_stream))

    return asyncio.run(ask_it())


@pytest.mark.parametrize("is_stream", [True, False])
def test_an_error_is_known_by_its_code(is_stream: bool) -> None:
    async def taken_away(_: web.Request) -> web.Response:
        body = {"error": {"message": "it was deleted", "code": GONE}}
        if is_stream:
            events = ({"choices": [{"token_ids": [5, 6]}]}, body)
            return web.Response(text="".join(f"data: {json.dumps(event)}\n\n" for event in events))
        return web.json_response(body, status=404)

    got = asked(taken_away, is_stream=is_stream)
    assert (got.status, got.token_ids) == ((200, [5, 6]) if is_stream else (404, []))
    assert got.code == GONE and "it was deleted" in str(got.error)


@pytest.mark.parametrize("body", ["<html>", "[]", '{"error": "down"}', '{"error": null}'])
def test_a_body_without_a_code_has_none(body: str) -> None:
    async def broken(_: web.Request) -> web.Response:
        return web.Response(text=body, status=502)

    got = asked(broken, is_stream=False)
    assert got.status == 502 and got.code is None and got.error == f"502: {body}"
