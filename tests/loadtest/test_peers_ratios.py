"""Ratios, limits and the page from known measurements: the verdict is of what was measured, and says what was not."""

from dataclasses import replace

import pytest

from loadtest.client import Reply
from loadtest.peers_bytes import Bandwidth, StepBytes
from loadtest.peers_cells import CELLS, PAIRS, select
from loadtest.peers_endpoints import LLAMA_CPP, OURS, PEFT, VLLM
from loadtest.peers_measure import Decode, Measured, decode_window
from loadtest.peers_requirements import DecodeLimit, Requirement, decode_limit, requirements
from loadtest.peers_rounds import Results
from loadtest.peers_table import Setting, page
from loadtest.proof import Proof
from loadtest.report import Figures, Percentiles, measure
from loadtest.workload import Workload

_BYTES = StepBytes(base=270_000_000, kv_per_token=23_040, adapter=9_768_960)
_BANDWIDTH = Bandwidth(read=30e9, copy=40e9)


def _reply(arrivals: list[float], *, sent: float = 0.0, tokens: int | None = None) -> Reply:
    call = Workload(models=("a",), num_requests=1).calls()[0]
    return Reply(call, sent, "v", arrivals, prompt_tokens=10, completion_tokens=tokens or len(arrivals))


def _figures(rate: float, ttft_ms: float = 100.0) -> Figures:
    plain = measure([_reply([0.5, 1.0])], None)
    return replace(plain, output_tokens_per_second=rate, ttft_ms=Percentiles(ttft_ms, ttft_ms, ttft_ms))


def _measured(rate: float, ttft_ms: float = 100.0, decode: float | None = None) -> Measured:
    return Measured(_figures(rate, ttft_ms), None if decode is None else Decode(decode, 100.0))


@pytest.fixture
def results() -> Results:
    found = Results()
    for cell in CELLS:
        for name, rates in ((OURS, (300, 320, 900)), (LLAMA_CPP, (50, 64, 60)), (VLLM, (40, 41, 42))):
            found.cells[cell.name, name] = [_measured(rate, ttft_ms=10_000 / rate) for rate in rates]
    found.cells["32x32", PEFT] = [_measured(20, ttft_ms=400)]
    for pair in PAIRS:
        found.pairs[pair.name, "over"] = [_measured(100, decode=90), _measured(98, decode=80), _measured(96, decode=70)]
        found.pairs[pair.name, "under"] = [_measured(100, decode=100)] * 3
    return found


def _row(rows: list[Requirement], beginning: str, end: str = "") -> Requirement:
    (found,) = [each for each in rows if each.what.startswith(beginning) and each.what.endswith(end)]
    return found


def test_every_row_of_what_must_hold_is_there(results: Results) -> None:
    limits = [limit for rows in (8, 32) if (limit := decode_limit(results, rows, _BYTES, _BANDWIDTH)) is not None]
    rows = requirements(results, limits)
    assert [each.bound for each in rows] == [3.0, 5.0, 1.5, 0.5, 1.5, 0.25, 0.8, 0.8, 0.9, 0.98, 6.0, 3.5, 1.0]
    assert all(each.value is not None for each in rows[:-1])


def test_memory_is_the_most_of_any_load(results: Results) -> None:
    assert _row(requirements(results, []), "resident memory").value is None, "nothing said what it holds"
    for number, over in enumerate((0.5, 1.25, None)):
        proof = Proof(
            steps=1, adapters_per_step=1, rows_per_step=1, adapters_in_flight=1, rows_in_flight=1,
            requests_per_version={}, memory_over=None if over is None else over * 2**30,
        )  # fmt: skip
        results.cells["1xbase", OURS][number] = Measured(replace(_figures(100), proof=proof), None)
    row = _row(requirements(results, []), "resident memory")
    assert row.value == 1.25 and row.held is False


def test_throughput_is_over_the_best_peer(results: Results) -> None:
    row = _row(requirements(results, []), "output tok/s, 8 in flight")
    assert row.value == pytest.approx(320 / 60)
    assert (row.note, row.held) == (LLAMA_CPP, True)


def test_first_token_is_over_the_quickest_peer(results: Results) -> None:
    row = _row(requirements(results, []), "median TTFT")
    assert row.value == pytest.approx((10_000 / 320) / (10_000 / 60))
    assert (row.note, row.held) == (LLAMA_CPP, True)
    results.cells["32x32", PEFT] = [_measured(20, ttft_ms=1.0)]
    row = _row(requirements(results, []), "median TTFT")
    assert (row.note, row.held) == (PEFT, False)


def test_a_named_peer_is_compared_with_by_name(results: Results) -> None:
    rows = requirements(results, [])
    assert _row(rows, "output tok/s, base only, 1 in flight", VLLM).value == pytest.approx(320 / 41)
    assert _row(rows, "output tok/s, 32 in flight", PEFT).value == pytest.approx(320 / 20)


def test_what_was_not_measured_has_no_verdict() -> None:
    assert {each.held for each in requirements(Results(), [])} == {None}
    assert decode_limit(Results(), 8, _BYTES, _BANDWIDTH) is None


def test_decode_limit_counts_bytes(results: Results) -> None:
    limit = decode_limit(results, 8, _BYTES, _BANDWIDTH)
    assert limit is not None
    without = 270_000_000 + 8 * 100 * 23_040
    assert limit.phi == pytest.approx(without / (without + 8 * 9_768_960))
    assert limit.eta == pytest.approx(0.8)
    assert limit.rho_base == pytest.approx(without / 30e9 / (8 / 100))
    assert limit.rho_lora == pytest.approx((without + 8 * 9_768_960) / 30e9 / (8 / 80))


def test_decode_window_is_where_all_rows_decode() -> None:
    late = _reply([1.0, 2.0, 3.0, 4.0])
    early = _reply([0.0, 0.5, 1.5, 2.5, 3.5])
    window = decode_window([late, early])  # (1.0, 3.5]: 2 tokens of the first, 3 of the second
    assert window == Decode(5 / 2.5, (12 + 12.5) / 2)


def test_decode_window_counts_tokens_that_arrived_together() -> None:
    window = decode_window([_reply([1.0, 2.0, 3.0], tokens=6)])
    assert window is not None
    assert window.tokens_per_second == pytest.approx(4 / 2.0)


def test_no_window_when_rows_never_met() -> None:
    assert decode_window([_reply([0.0, 1.0]), _reply([2.0, 3.0])]) is None


def _page(results: Results, limits: list[DecodeLimit]) -> str:
    setting = Setting(
        when="now",
        command="python -m loadtest peers",
        machine="a machine",
        load_before=0.1,
        rounds=3,
        output_tokens=64,
        versions={"torch": "2"},
        commands={OURS: "python -m server"},
        missing={VLLM: "--without vllm"},
        bandwidth=_BANDWIDTH,
        step_bytes=_BYTES,
    )
    return page(setting, results, CELLS, PAIRS, limits, requirements(results, limits))


def test_page_says_what_was_missed_and_who_was_missing(results: Results) -> None:
    limit = decode_limit(results, 32, _BYTES, _BANDWIDTH)
    assert limit is not None
    text = _page(results, [limit])
    assert "vLLM was left out: --without vllm." in text
    assert (
        "| output tok/s, 8 in flight over 32 adapters, over the best peer | at least 3 | 5.33 | held | llama.cpp |"
        in text
    )
    assert "| base-only traffic, adapters loaded over none | at least 0.98 | 0.98 | held |" in text
    assert f"| 32 | 100.0 | 80.0 | 0.800 | {limit.phi:.3f} | {0.8 / limit.phi:.3f} |" in text
    assert "300.0, 320.0, 900.0" in text


def test_page_says_what_was_not_measured() -> None:
    text = _page(Results(), [])
    assert text.count("not measured") == 13
    assert "held" not in text.partition("## How")[0].replace("not measured", "")


def test_selection_is_by_name_and_by_group() -> None:
    assert select(None) == (CELLS, PAIRS)
    assert select("peers") == (CELLS, ())
    cells, pairs = select("8x32,eta-8,mixed")
    assert [each.name for each in (*cells, *pairs)] == ["8x32", "eta-8", "mixed"]
    with pytest.raises(ValueError, match="no cell 9x9; there are peers, own, 8x32"):
        select("8x32,9x9")
