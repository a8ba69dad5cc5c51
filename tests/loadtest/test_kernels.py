"""`loadtest kernels`: it runs, its floors count the bytes there are, its limit tells slow from fast."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from adapters.ops.thread_team import ThreadTeam, current_team
from loadtest import __main__ as command_line
from loadtest import kernels_cases, kernels_run
from loadtest.kernels_cases import GROUPS, LORA, NUM_LAYERS, RANK, Sizes
from loadtest.kernels_run import MAX_OVER_BYTES, Timed
from loadtest.kernels_timing import Case, Probe, Reading, last_cache_bytes, time_cases


def timed(shape: str, rows: int, over: float, floor: float = 1e-5) -> Timed:
    seconds = Reading(least=0.9 * over * floor, median=over * floor)
    return Timed(LORA, shape, f"{rows} rows", rows, NUM_LAYERS, seconds, floor, floor / 10, 0.9 * floor)


def only_one_shape(sizes: Sizes, _team: ThreadTeam) -> Iterator[tuple[str, list[Case]]]:
    yield LORA, kernels_cases.lora_cases(GROUPS[0], replace(sizes, num_layers=1))


def test_a_quick_run_times_everything_and_leaves_the_threads_as_they_were(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = current_team().num_threads
    page = tmp_path / "cpu-kernels.md"
    arguments = ["kernels", "--quick", "--threads", "2", "--results", str(tmp_path), "--publish", str(page)]
    assert command_line.main(arguments) == 0
    assert current_team().num_threads == before
    (written,) = tmp_path.glob("kernels-*.json")
    found = json.loads(written.read_text())
    assert found["threads"] == 2 and found["quick"]
    operations = found["operations"]
    assert {each["op"] for each in operations} == {"LoRA", "product", "attention", "RMSNorm", "rotary"}
    assert {each["shape"] for each in operations if each["op"] == "LoRA"} == {group.shape for group in GROUPS}
    assert all(0 < each["µs, least"] <= each["µs, median"] and each["byte floor µs"] > 0 for each in operations)
    assert all(min(each["read GB/s"], each["copy GB/s"], each["bf16 GFLOP/s"]) > 0 for each in found["ceilings"])
    assert len(found["limits"]) == 2 * (len(GROUPS) + 1)
    assert "Quick" in page.read_text() and page.read_text() in capsys.readouterr().out


def test_a_pass_walks_over_the_working_set_with_adapters_of_its_own() -> None:
    sizes = Sizes(working_set=6 << 20, num_layers=2)
    group = GROUPS[0]
    for case in kernels_cases.lora_cases(group, sizes):
        adapters = case.num_bytes / (2 * RANK * group.weights_per_rank)
        assert adapters == (case.rows if case.rows <= 32 else int(case.size.split()[2]))
        starts = [
            (id(call.func.__self__), start)  # type: ignore[attr-defined]
            for call in case.calls
            for start in dict.fromkeys(call.args[2].batch.starts.tolist())  # type: ignore[attr-defined]
        ]
        assert len(starts) == len(set(starts)), "an adapter came back within one pass"
        assert len(starts) * case.num_bytes / adapters >= sizes.working_set


def test_an_adapters_bytes_are_those_of_its_tensors() -> None:
    for group in GROUPS:
        pools = kernels_cases.lora_pools(group, num_adapters=2)
        tensors = (pools.a_pool, *pools.b_pools)
        held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        assert held == 2 * 2 * RANK * group.weights_per_rank


def test_the_limit_is_of_each_shape_and_of_the_whole_step() -> None:
    cases = [timed("small", 8, 2.0, floor=1e-6), timed("large", 8, 1.0, floor=1e-4), timed("large", 32, 1.6)]
    small, large, step, *many = kernels_run.limits(cases)
    assert MAX_OVER_BYTES == 1.5
    assert (small["holds"], large["holds"], step["holds"]) == (False, True, True)
    assert [(each["rows"], each["holds"]) for each in many] == [(32, False), (32, False)]
    assert step["over byte floor"] == pytest.approx((2e-6 + 1e-4) / (1e-6 + 1e-4))
    assert step["byte floor µs"] == pytest.approx(NUM_LAYERS * 101)


@pytest.mark.parametrize(("limit", "check", "status"), [(1e9, True, 0), (1e-9, True, 1), (1e-9, False, 0)])
def test_over_the_limit_fails_unless_told_not_to_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: float, check: bool, status: int
) -> None:
    monkeypatch.setattr(kernels_run, "MAX_OVER_BYTES", limit)
    monkeypatch.setattr(kernels_run, "last_cache_bytes", lambda: 1 << 18)
    monkeypatch.setattr(kernels_run, "_PRODUCT", 128)
    monkeypatch.setattr(kernels_cases, "families", only_one_shape)
    arguments = ["kernels", "--rounds", "1", "--threads", "1", "--results", str(tmp_path)]
    assert command_line.main(arguments + ([] if check else ["--no-check"])) == status


@pytest.mark.parametrize("is_decode", [True, False], ids=["played", "called"])
def test_a_case_that_takes_longer_reads_longer(is_decode: bool) -> None:
    team = ThreadTeam(1)
    probe = Probe(team, 1 << 20, 64)
    cases = [
        Case(
            op="sum",
            shape="",
            size="",
            calls=[partial(torch.cumsum, torch.zeros(n), 0)],
            num_bytes=8,
            flops=8,
            rows=1,
            is_decode=is_decode,
        )  # fmt: skip
        for n in (10_000, 1_000_000)
    ]
    (short, long), ceilings = time_cases(cases, team, probe, rounds=3)
    assert long.median > 3 * short.median
    assert ceilings.floors(cases[0]) == (8 / ceilings.read_bytes, 8 / ceilings.flops)


def test_the_last_caches_are_counted_once_each(tmp_path: Path) -> None:
    for cpu, shared in (("cpu0", "0-1"), ("cpu1", "0-1"), ("cpu2", "2")):
        for index, (level, size) in enumerate((("2", "1024K"), ("3", "32768K"))):
            folder = tmp_path / cpu / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            for name, text in (("level", level), ("size", size), ("shared_cpu_list", shared)):
                (folder / name).write_text(f"{text}\n")
    assert last_cache_bytes(tmp_path) == 2 * (32 << 20)
    assert last_cache_bytes(tmp_path / "none") == 32 << 20


@pytest.mark.parametrize("argument", ["--rounds", "--threads"])
def test_none_is_no_number_to_measure_with(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["kernels", argument, "0"]) == 1
    assert f"{argument} is 0; it must be at least 1" in capsys.readouterr().err


def test_the_larger_floor_counts_and_the_least_time_meets_the_best_bandwidth() -> None:
    slow = timed("any", 8, 2.0)
    assert slow.over_floor == pytest.approx(2.0) and slow.least_over_floor == pytest.approx(2.0)
    assert slow._replace(flop_floor=4e-5).over_floor == pytest.approx(0.5)
