"""How far a load is, while it works: the norms that DoRA needs, in the description and in the stream, and no harm where
nobody can be told. The adapter is PEFT's, the base a tiny model, whose rows are given when the test says so."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from adapters.base_walk import modules_of
from adapters.base_weights import BaseWeights
from adapters.checkpoint import load_lora_model
from server.engine.live_weights import LiveWeights
from server.lifecycle import adapter_loader
from server.lifecycle.load_job import LoadJob
from server.lifecycle.sources import thread_reports
from server.lifecycle.sources.thread_reports import REPORT_EVERY, ThreadReports
from tests.adapters.peft_files import llama, save
from tests.api.adapter_world import LIMITS, AdapterWorld, adapter_world
from tests.api.test_adapter_life import load
from tests.api.test_cold_adapters import until
from tests.api.test_watch import watching

pytestmark = pytest.mark.asyncio

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROWS = 2 * (16 + 8 + 8 + 16 + 24 + 24 + 16)  # of two layers
MODULES = 14


class HeldWeights:
    """A model's weights, given a module at a time."""

    def __init__(self, real: BaseWeights) -> None:
        self._real = real
        self._steps = threading.Semaphore(0)
        self.fingerprint = real.fingerprint

    def let_through(self, num_modules: int) -> None:
        self._steps.release(num_modules)

    def shape(self, parameter: str) -> tuple[int, ...] | None:
        return self._real.shape(parameter)

    def rows(self, parameter: str, begin: int, end: int) -> Tensor:
        assert self._steps.acquire(timeout=60)
        return self._real.rows(parameter, begin, end)


@asynccontextmanager
async def dora_world(folder: Path) -> AsyncIterator[tuple[AdapterWorld, HeldWeights, str]]:
    model = llama()
    save(folder / "dora", LoraConfig(r=4, target_modules=LINEARS, use_dora=True), loaded=False)
    weights = HeldWeights(LiveWeights(lambda: model, "tiny"))
    read = partial(load_lora_model, base=modules_of(model), limits=LIMITS, dtype=torch.float32, weights=weights)
    async with adapter_world(folder, read=read, fingerprint="tiny") as world:
        try:
            yield world, weights, str(folder / "dora")
        finally:
            weights.let_through(1000)


async def described(world: AdapterWorld) -> dict[str, Any]:
    shown: dict[str, Any] = (await world.client.get("/v1/adapters/dora")).json()
    return shown


async def test_norms_are_counted_in_the_description_until_the_load_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thread_reports, "REPORT_EVERY", 0.0)
    async with dora_world(tmp_path) as (world, weights, source):
        reply = await world.client.post("/v1/adapters", json={"name": "dora", "source": source})
        assert (reply.status_code, reply.json()["progress"]) == (202, {"unit": "bytes", "done": 0, "total": None})
        seen = [0]
        for _ in range(MODULES - 1):
            weights.let_through(1)
            await until(lambda: world.service.loader.jobs["dora"].num_done > seen[-1])
            shown = await described(world)
            assert shown["state"] == "validating" and shown["pending"] == source
            assert (shown["progress"]["unit"], shown["progress"]["total"]) == ("norms", ROWS)
            assert seen[-1] < shown["progress"]["done"] < ROWS
            seen.append(shown["progress"]["done"])
        weights.let_through(1)
        await world.settle()
        shown = await described(world)
        assert (shown["state"], shown["progress"], shown["features"]) == ("ready", None, ["dora"])
        assert len(seen) == MODULES


async def test_norms_are_counted_in_the_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_reports, "REPORT_EVERY", 0.0)
    monkeypatch.setattr(adapter_loader, "_TELL_EVERY", 0.0)
    async with dora_world(tmp_path) as (world, weights, source), watching(world) as watch:
        await world.client.post("/v1/adapters", json={"name": "dora", "source": source})
        done = [0]
        while len(done) < MODULES:
            weights.let_through(1)
            while not ((told := (await watch.next())["progress"]) and told["unit"] == "norms"):
                pass  # accepted, fetched
            assert told["total"] == ROWS and done[-1] < told["done"] < ROWS
            done.append(told["done"])
        weights.let_through(1)
        while (await watch.until_state("dora", "ready"))["progress"] is not None:
            pass  # it stands, and its load is not over yet


async def test_the_stream_is_told_at_a_bounded_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_reports, "REPORT_EVERY", 0.0)
    monkeypatch.setattr(adapter_loader, "_TELL_EVERY", 3600.0)
    monkeypatch.setattr("adapters.base_weights._AT_ONCE", 1)  # each row is a call, and a report
    async with dora_world(tmp_path) as (world, weights, source), watching(world) as watch:
        weights.let_through(ROWS)
        await load(world, "dora", source)
        told = [await watch.next()]
        while told[-1]["state"] != "ready":
            told.append(await watch.next())
        counted = [each["progress"]["done"] for each in told if each["state"] == "validating"]
        assert 1 <= len(counted) <= 3 < MODULES, "accepted, fetched, and one of the reports"


@pytest.mark.parametrize("where", ["the loop", "the thread"])
async def test_who_cannot_be_told_harms_no_load(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("nobody listens")

    async with dora_world(tmp_path) as (world, weights, source):
        weights.let_through(MODULES)
        if where == "the loop":
            monkeypatch.setattr(LoadJob, "progress", broken)
        else:
            monkeypatch.setattr(ThreadReports, "from_thread", broken)
        with caplog.at_level(logging.ERROR):
            loaded = await load(world, "dora", source)
        assert (loaded["state"], loaded["features"]) == ("ready", ["dora"])
        assert "nobody listens" in caplog.text


async def test_a_load_without_norms_tells_of_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(LoadJob, "progress", lambda self, *counts: told.append(counts))
    async with adapter_world(tmp_path) as world:
        assert (await load(world, "sql", world.adapter("a")))["state"] == "ready"
    assert told == []


async def test_thousands_of_reports_are_a_few_calls_of_the_loop() -> None:
    told: list[tuple[int, int | None]] = []
    with ThreadReports(lambda done, total: told.append((done, total))) as reports:
        began = asyncio.get_running_loop().time()
        await asyncio.to_thread(lambda: [reports.from_thread(n, 50_000) for n in range(50_001)])
        most = (asyncio.get_running_loop().time() - began) / REPORT_EVERY + 2
        await asyncio.sleep(0)
        assert told[-1] == (50_000, 50_000) and 2 <= len(told) <= most
    reports.from_thread(1, 1)
    await asyncio.sleep(0)
    assert told[-1] == (50_000, 50_000), "it is over"


async def test_a_loop_that_has_closed_is_told_nothing() -> None:
    async def made() -> ThreadReports:
        return ThreadReports(lambda done, total: None)

    reports = await asyncio.to_thread(lambda: asyncio.run(made()))
    reports.from_thread(1, 2)
