"""What the churn makes of names, replies and counters, without a server: each way to be wrong is seen as what it is."""

import argparse
import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from loadtest import churn_command
from loadtest.churn_adapters import RANKS, linear_shapes, pool_bytes
from loadtest.churn_client import Answer, Question, ask
from loadtest.churn_names import NameBook
from loadtest.churn_oracle import Oracle
from loadtest.churn_rest import HITS, PREEMPTIONS, Watch
from loadtest.churn_verdict import Verdict

BASE = "base"
GONE = "model_not_found"
ORACLE = Oracle(
    ("p",),
    (),
    4,
    {("old", 0): [1, 2, 3, 4], ("new", 0): [5, 6, 7, 8], (None, 0): [9, 9, 9, 9], ("alike", 0): [1, 2, 0, 0]},
)


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


@pytest.mark.parametrize(
    ("preemptions", "hits", "in_host", "fault"),
    [(0, 9, 6, None), (2, 9, 6, "2 preemptions"), (0, 0, 6, "not on trial"), (0, 9, 7, "7 adapters stood in host")],
)
def test_what_would_make_a_run_prove_nothing_is_a_fault(
    preemptions: int, hits: int, in_host: int, fault: str | None
) -> None:
    now = {PREEMPTIONS: 1.0 + preemptions, HITS: 5.0 + hits}
    watch = Watch(None, {PREEMPTIONS: 1.0, HITS: 5.0}, now, in_host, 4)  # type: ignore[arg-type]
    found = watch.faults(host_room=6)
    assert len(found) == (fault is not None) and (fault is None or fault in found[0])


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


def asked(reply: Callable[[web.Request], Awaitable[web.Response]], *, is_stream: bool) -> Answer:
    """What a client makes of a server that replies so."""

    async def ask_it() -> Answer:
        app = web.Application()
        app.router.add_post("/v1/completions", reply)
        async with TestServer(app) as server, aiohttp.ClientSession(server.make_url("/")) as session:
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
