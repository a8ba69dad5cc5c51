"""Figures worked out by hand: TPOT, ITL, throughput, goodput; doubts are said; tables hold what was measured."""

import pytest

from loadtest.client import Reply
from loadtest.goodput import Goodput, Limits
from loadtest.lengths import STANDARD
from loadtest.report import Figures, Percentiles, describe_workload, measure
from loadtest.workload import Call, Workload


def _reply(
    sent: float, arrivals: list[float], *, tokens: int | None = None, prompt: int = 10, **changes: object
) -> Reply:
    call = Call(0, "a", 0, "p", tokens or len(arrivals), prompt_tokens=10)
    return Reply(call, sent, "v", arrivals, prompt, tokens or len(arrivals), **changes)


# TTFT 1 s, then 0.1 and 0.3 s; TPOT 0.2 s; 1.4 s end to end.
_SLOW = _reply(0.0, [1.0, 1.1, 1.4])
# TTFT 0.5 s, then four tokens in two chunks 0.2 s later each: TPOT 0.4 / 4 = 0.1 s.
_FAST = _reply(1.0, [1.5, 1.7, 1.9], tokens=5)
_ONE_TOKEN = _reply(0.5, [2.5])
_FAILED = _reply(0.0, [], error="request 3 to 'a': 429 full")


def test_times_of_a_reply() -> None:
    assert _SLOW.time_to_first_token == 1.0
    assert _SLOW.time_per_output_token == pytest.approx(0.2)
    assert _FAST.time_per_output_token == pytest.approx(0.1)
    assert _FAST.inter_token_latencies == pytest.approx([0.2, 0.2])
    assert _FAST.end_to_end == pytest.approx(0.9)
    assert _ONE_TOKEN.time_per_output_token is None


def test_figures_by_hand() -> None:
    """Nine tokens out and 30 in, from 0 to 2.5 s; the failed request counts as an error and nowhere else."""
    figures = measure([_SLOW, _FAST, _ONE_TOKEN, _FAILED], None, cpu_seconds=0.05)
    assert (figures.requests, figures.errors) == (3, 1)
    assert figures.wall_seconds == 2.5
    assert figures.output_tokens_per_second == pytest.approx(9 / 2.5)
    assert figures.total_tokens_per_second == pytest.approx(39 / 2.5)
    assert figures.requests_per_second == pytest.approx(3 / 2.5)
    assert figures.ttft_ms == Percentiles(1000.0, 2000.0, 2000.0)
    assert figures.tpot_ms == Percentiles(100.0, 200.0, 200.0)  # of two requests; the third had one token
    assert figures.itl_ms == Percentiles(200.0, 300.0, 300.0)  # 0.1, 0.2, 0.2, 0.3 s in one pool
    assert figures.e2e_ms == Percentiles(1400.0, 2000.0, 2000.0)
    assert figures.client is not None
    assert figures.client.cpu_share == 0.02
    assert figures.client.cpu_us_per_token == pytest.approx(0.05 / 9 * 1e6, rel=0.01)
    assert figures.warnings == ()


@pytest.mark.parametrize(
    ("texts", "good"),
    [
        (["ttft=1000"], 2),  # slow and fast
        (["ttft=999.9"], 1),
        (["tpot=150"], 2),  # fast, and the one without a second token
        (["e2e=2000"], 3),
        (["ttft=1000", "tpot=150"], 1),  # only the fast one meets both
        (["ttft=1"], 0),
        ([], 3),
    ],
)
def test_goodput_is_of_requests_that_met_every_limit(texts: list[str], good: int) -> None:
    goodput = Goodput.of([_SLOW, _FAST, _ONE_TOKEN, _FAILED], Limits.parse(texts), wall_seconds=2.0)
    assert goodput.requests_per_second == good / 2
    assert goodput.share == good / 4


@pytest.mark.parametrize("wrong", ["ttft", "ttft=", "ttft=fast", "itl=5", "e2e=0", "tpot=-1", "tpot=nan"])
def test_what_is_no_limit_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="e2e=MS, tpot=MS, ttft=MS"):
        Limits.parse([wrong])


def test_limits_read_as_they_were_given() -> None:
    assert str(Limits.parse(["tpot=100", "ttft=1000"])) == "TTFT ≤ 1000 ms, TPOT ≤ 100 ms"


def test_prompts_of_another_length_are_doubted() -> None:
    assert measure([_reply(0.0, [1.0], prompt=11)], None).warnings == ()
    (warning,) = measure([_reply(0.0, [1.0], prompt=12)], None).warnings
    assert "12 tokens where 10 were asked for" in warning


def test_client_that_takes_the_servers_core_is_doubted() -> None:
    assert measure([_ONE_TOKEN], None, cpu_seconds=0.29).warnings == ()
    (warning,) = measure([_ONE_TOKEN], None, cpu_seconds=0.4).warnings
    assert "20% of a core" in warning


def test_lateness_is_of_every_request_sent() -> None:
    late = [_reply(0.0 + i + 0.004 * i, [i + 0.9], scheduled=float(i)) for i in range(6)]
    figures = measure(late, None)
    assert figures.lateness_ms == Percentiles(8.0, 20.0, 20.0)
    assert figures.warnings == ()


def test_table_and_lines_hold_every_figure() -> None:
    figures = measure([_SLOW, _FAST], None, limits=Limits(ttft=700), adapter_traffic={"x:adapter_loads_total": 7})
    for text in (str(figures), figures.markdown()):
        for part in ("5.0 / 5.0", "1.05 req/s", "0.53 req/s, 50.0%", "x:adapter_loads_total 7", "top-1 share 100.0%"):
            assert part in text.replace("500 / 1000 / 1000", "5.0 / 5.0"), part
    assert figures.markdown().startswith("| figure | value |\n|---|---|\n| output tok/s | 4.2 |")


def test_old_figures_need_only_what_they_had() -> None:
    times = Percentiles(1.0, 2.0, 3.0)
    figures = Figures(
        output_tokens_per_second=1.0,
        wall_seconds=1.0,
        output_tokens=1,
        prompt_tokens=1,
        ttft_ms=times,
        itl_ms=times,
        e2e_ms=times,
        proof=None,
    )
    assert "1.0 / 2.0 / 3.0" in str(figures)


def test_workload_is_described_as_it_is() -> None:
    closed = describe_workload(Workload(models=("a", "b"), in_flight=3))
    assert closed.startswith("3 in flight, 2 models round-robin, 32 requests, 64-word prompts, 64 output tokens")
    open_loop = Workload(models=("a",), arrivals="gamma", rate=2.5, cv=4, lengths="p2", scale=0.25)
    described = describe_workload(open_loop)
    assert described.startswith("gamma arrivals (cv 4) at 2.5 req/s, 1 models round-robin")
    assert f"P2 ({STANDARD['p2'].text}), lengths × 0.25" in described
