"""/v1/adapters beyond loading: acknowledged loads, failures, settings, validation, rollback, what an unload does."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from server.config import LoRALimits
from server.lifecycle.load_job import LoadJob
from tests.adapters.hostile import write_config
from tests.api.adapter_world import AdapterWorld, adapter_world

pytestmark = pytest.mark.asyncio

ASK = {"model": "sql", "prompt": "x", "max_tokens": 4}


async def load(world: AdapterWorld, name: str, source: str, **body: Any) -> dict[str, Any]:
    reply = await world.client.post("/v1/adapters?wait=600", json={"name": name, "source": source, **body})
    assert reply.status_code in (200, 201), reply.text
    described: dict[str, Any] = reply.json()
    return described


def hold_reads(world: AdapterWorld, monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Loads read nothing until the event is set."""
    gate, reader = asyncio.Event(), world.service.loader._sources
    read = reader.read

    async def held(source: str, *, progress: Any, on_fetched: Any) -> Any:
        on_fetched()
        await gate.wait()
        return await read(source, progress=progress)

    monkeypatch.setattr(reader, "read", held)
    return gate


async def until_job(world: AdapterWorld, name: str) -> LoadJob:
    while name not in world.service.loader.jobs:
        await asyncio.sleep(0)
    return world.service.loader.jobs[name]


async def test_a_load_is_acknowledged_at_once_and_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with adapter_world(tmp_path) as world:
        gate, source = hold_reads(world, monkeypatch), world.adapter("a")
        for wait in ("", "?wait=0", "?wait=0.01"):
            reply = await world.client.post(f"/v1/adapters{wait}", json={"name": "sql", "source": source, "pin": True})
            body = reply.json()
            assert (reply.status_code, body["object"], body["name"], body["version"]) == (202, "adapter", "sql", None)
            assert body["state"] in ("fetching", "validating")
            assert (body["pending"], body["pin"], body["tier"], body["failure"]) == (source, True, None, None)
            assert "outcome" not in body
        assert len(world.service.loader.jobs) == 1  # who asked again joined
        assert world.service.directory.records["sql"].pending is not None
        assert [each["state"] for each in (await world.client.get("/v1/adapters")).json()["data"]] == ["validating"]
        gate.set()
        await world.settle()
        now = (await world.client.get("/v1/adapters/sql")).json()
        assert (now["state"], now["tier"], now["pin"], now["pending"]) == ("ready", "host", True, None)


async def test_who_does_not_wait_finds_the_failure_in_the_description(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        folder = world.adapter("a")
        write_config(Path(folder), {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "layer_replication": [[0, 2]]})
        assert (await world.client.post("/v1/adapters", json={"name": "sql", "source": folder})).status_code == 202
        await world.settle()
        failed = (await world.client.get("/v1/adapters/sql")).json()
        assert (failed["state"], failed["version"], failed["source"]) == ("failed", None, folder)
        assert failed["failure"]["code"] == "adapter_unsupported" and "layer_replication" in failed["failure"]["why"]
        status, error = await world.refused("POST", "/v1/completions", json=ASK)
        assert (status, error["code"]) == (400, "adapter_failed")
        assert (await world.client.delete("/v1/adapters/sql")).json()["version"] is None
        assert (await world.client.get("/v1/adapters")).json()["data"] == []


async def test_who_waits_is_told_the_failure_and_nothing_is_left(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        body = {"name": "sql", "source": str(tmp_path / "nowhere")}
        status, error = await world.refused("POST", "/v1/adapters?wait=60", json=body)
        assert (status, error["code"]) == (404, "adapter_not_found")
        assert (await world.client.get("/v1/adapters")).json()["data"] == []


async def test_a_failed_replacement_leaves_the_name_as_it_was(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        first = await load(world, "sql", world.adapter("a"))
        body = {"name": "sql", "source": world.adapter("b", 1)}
        status, error = await world.refused("POST", "/v1/adapters?wait=60", json=body)
        assert (status, error["code"]) == (400, "adapter_already_loaded")
        assert (await world.client.get("/v1/adapters/sql")).json() == {
            key: value for key, value in first.items() if key != "outcome"
        }


async def test_a_name_can_be_taken_away_while_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with adapter_world(tmp_path) as world:
        hold_reads(world, monkeypatch)
        waiting = asyncio.create_task(
            world.client.post("/v1/adapters?wait=60", json={"name": "sql", "source": world.adapter("a")})
        )
        await until_job(world, "sql")
        gone = await world.client.delete("/v1/adapters/sql")
        assert (gone.status_code, gone.json()["state"]) == (200, "unloaded")
        reply = await waiting
        assert (reply.status_code, reply.json()["error"]["code"]) == (409, "adapter_load_cancelled")
        assert world.service.directory.records == {}


async def test_settings_are_changed_one_by_one(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        await load(world, "org/sql", world.adapter("a"), ttl=100.0, priority=3)

        async def patch(**body: Any) -> tuple[bool, float | None, int]:
            reply = await world.client.patch("/v1/adapters/org/sql", json=body)
            assert reply.status_code == 200, reply.text
            return reply.json()["pin"], reply.json()["ttl"], reply.json()["priority"]

        assert await patch() == (False, 100.0, 3)
        assert await patch(pin=True) == (True, 100.0, 3)
        assert await patch(priority=-1_000_000, pin=None) == (True, 100.0, -1_000_000)
        assert await patch(ttl=0) == (True, None, -1_000_000)
        assert await patch(pin=False, ttl=0.5) == (False, 0.5, -1_000_000)
        assert await patch(ttl=0) == (False, None, -1_000_000)
        status, error = await world.refused("PATCH", "/v1/adapters/nobody", json={"pin": True})
        assert (status, error["code"]) == (404, "adapter_not_found")


async def test_what_is_pinned_must_leave_room(tmp_path: Path) -> None:
    async with adapter_world(tmp_path, lora=LoRALimits(cpu_lora_memory=1000)) as world:
        await load(world, "sql", world.adapter("a"), pin=True)
        body = {"name": "chat", "source": world.adapter("b", 1), "pin": True}
        status, error = await world.refused("POST", "/v1/adapters?wait=60", json=body)
        assert (status, error["code"]) == (409, "adapter_capacity")
        assert list(world.service.directory.records) == ["sql"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"ttl": 0}, "ttl"), ({"ttl": -1}, "ttl"), ({"ttl": 1e10}, "ttl"), ({"ttl": True}, "ttl"),
        ({"ttl": "60"}, "ttl"), ({"priority": 1_000_001}, "priority"), ({"priority": -1_000_001}, "priority"),
        ({"priority": 2**70}, "priority"), ({"priority": 1.5}, "priority"), ({"priority": True}, "priority"),
        ({"pin": 1}, "pin"), ({"pin": "true"}, "pin"), ({"load_inplace": 0}, "load_inplace"), ({"name": ""}, "name"),
        ({"name": "x" * 513}, "name"), ({"name": ["sql"]}, "name"), ({"source": ""}, "source"),
        ({"source": "x" * 4097}, "source"), ({"source": 3}, "source"),
    ],
)  # fmt: skip
async def test_fields_of_a_load_have_bounds(tmp_path: Path, fields: dict[str, Any], param: str) -> None:
    async with adapter_world(tmp_path) as world:
        body = {"name": "sql", "source": world.adapter("a"), **fields}
        status, error = await world.refused("POST", "/v1/adapters", json=body)
        assert (status, error["param"]) == (400, param)
        if param in ("ttl", "priority", "pin") and fields != {"ttl": 0}:
            status, error = await world.refused("PATCH", "/v1/adapters/sql", json=fields)
            assert (status, error["param"]) == (400, param)
        assert world.service.directory.records == {} and not world.service.loader.jobs


@pytest.mark.parametrize(
    ("method", "query", "param"),
    [
        *(("POST", f"wait={wait}", "wait") for wait in ("-1", "600.1", "nan", "inf", "x", "1e999", "")),
        *(("DELETE", f"deadline={deadline}", "deadline") for deadline in ("-0.1", "601", "nan", "-inf", "soon")),
        *(("DELETE", f"mode={mode}", "mode") for mode in ("", "now", "ABORT")),
        *(("GET", f"watch={watch}", "watch") for watch in ("2", "", "please")),
    ],
)
async def test_parameters_have_bounds(tmp_path: Path, method: str, query: str, param: str) -> None:
    async with adapter_world(tmp_path) as world:
        await load(world, "sql", world.adapter("a"))
        path = "/v1/adapters/sql" if method == "DELETE" else "/v1/adapters"
        body = {"name": "new", "source": world.adapter("b", 1)} if method == "POST" else None
        status, error = await world.refused(method, f"{path}?{query}", json=body)
        assert (status, error["param"]) == (400, param)
        assert list(world.service.directory.records) == ["sql"] and not world.service.loader.jobs


@pytest.mark.parametrize(
    "name", ["a\0b", "\u0441\u0443\u043a", "a b", "a\nb", "-a", "..", "a//b", "a/", "x" * 129, "\u202ea", "%00"]
)
async def test_names_that_are_no_names(tmp_path: Path, name: str) -> None:
    async with adapter_world(tmp_path) as world:
        source = world.adapter("a")
        for path, body in (
            ("/v1/adapters", {"name": name, "source": source}),
            ("/v1/load_lora_adapter", {"lora_name": name, "lora_path": source}),
        ):
            reply = await world.client.post(path, json=body)
            assert (reply.status_code, reply.json()["error"]["code"]) == (400, "adapter_name_invalid")
            assert "\0" not in reply.json()["error"]["message"] and "\u202e" not in reply.json()["error"]["message"]
        assert world.service.directory.records == {} and not world.service.loader.jobs


@pytest.mark.parametrize(
    ("source", "status", "code"),
    [
        ("a\0b", 404, "adapter_not_found"),
        ("ftp://x/y", 400, "adapter_source_invalid"),
        ("https://example.org/a", 403, "adapter_source_not_allowed"),
        ("upload:xyz", None, None),
        ("/etc", 403, "adapter_source_not_allowed"),
        ("allowed/../../etc", None, None),
    ],
)
async def test_sources_are_refused_before_anything_begins(
    tmp_path: Path, source: str, status: int | None, code: str | None
) -> None:
    async with adapter_world(tmp_path, roots=(tmp_path / "allowed",)) as world:
        (tmp_path / "allowed").mkdir()
        for path, body in (
            ("/v1/adapters", {"name": "sql", "source": source}),
            ("/v1/adapters?wait=60", {"name": "sql", "source": source}),
            ("/v1/adapters/sql/validate", {"source": source}),
        ):
            if status is None and path == "/v1/adapters":
                continue  # what only a look at the disk can tell comes to those who wait
            got, error = await world.refused("POST", path, json=body)
            assert got in (400, 403, 404) if status is None else got == status
            assert isinstance(error["code"], str) if code is None else error["code"] == code
        assert world.service.directory.records == {}


async def test_validation_reads_to_the_end_and_changes_nothing(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        good, other = world.adapter("a"), world.adapter("b", 1)
        first = await load(world, "sql", good)
        kept = set(world.service.store.versions())
        reply = await world.client.post("/v1/adapters/sql/validate", json={"source": other})
        body = reply.json()
        assert (reply.status_code, body["ok"], body["num_modules"]) == (200, True, 3)
        assert len(body["version"]) == 64 and body["version"] != first["version"]
        write_config(Path(other), {"peft_type": "LORA", "r": 64, "lora_alpha": 8})
        status, error = await world.refused("POST", "/v1/adapters/new/validate", json={"source": other})
        assert status == 400 and error.keys() >= {"feature", "tensor", "why", "fix"}
        for name in ("org/base", "../x"):
            status, error = await world.refused("POST", f"/v1/adapters/{name}/validate", json={"source": good})
            assert status in (400, 404)
        assert set(world.service.store.versions()) == kept
        assert (await world.client.get("/v1/adapters")).json()["data"] == [
            {key: value for key, value in first.items() if key != "outcome"}
        ]


async def test_rollback_goes_to_the_version_before_and_there_again(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        first = await load(world, "sql", world.adapter("a"))
        status, error = await world.refused("POST", "/v1/adapters/sql/rollback")
        assert (status, error["code"]) == (409, "adapter_no_previous_version")
        second = await load(world, "sql", world.adapter("b", 1), load_inplace=True)
        assert second["previous"] == [first["version"]]
        for there, back in ((first, second), (second, first)):
            reply = await world.client.post("/v1/adapters/sql/rollback")
            body = reply.json()
            assert (reply.status_code, body["version"], body["source"]) == (200, there["version"], there["source"])
            assert body["previous"] == [back["version"]]
            answered = await world.client.post("/v1/completions", json=ASK)
            assert answered.headers["x-loramux-adapter-version"] == there["version"]
        status, error = await world.refused("POST", "/v1/adapters/nobody/rollback")
        assert (status, error["code"]) == (404, "adapter_not_found")


async def test_unload_frees_and_says_how_much(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        adapter = await load(world, "sql", world.adapter("a"))
        reply = await world.client.delete("/v1/adapters/sql")
        assert reply.status_code == 200
        assert reply.json() == {
            "object": "adapter",
            "name": "sql",
            "version": adapter["version"],
            "state": "unloaded",
            "deleted": True,
            "freed": {"host_bytes": adapter["num_bytes"], "device_bytes": 0},
        }
        assert list(world.service.store.versions()) == []


async def stream_events(world: AdapterWorld) -> list[str]:
    async with world.client.stream("POST", "/v1/completions", json={**ASK, "max_tokens": 40, "stream": True}) as reply:
        return [line async for line in reply.aiter_lines() if line]


async def until_running(world: AdapterWorld, count: int) -> None:
    while len(world.engine.streams) < count:
        await asyncio.sleep(0)


@pytest.mark.parametrize("query", ["mode=abort", "deadline=0", "mode=drain&deadline=0.02"])
async def test_aborting_ends_running_requests_and_says_why(tmp_path: Path, query: str) -> None:
    async with adapter_world(tmp_path) as world:
        adapter = await load(world, "sql", world.adapter("a"))
        world.engine.gate.clear()
        streamed = asyncio.create_task(stream_events(world))
        whole = asyncio.create_task(world.client.post("/v1/completions", json={**ASK, "n": 2}))
        await until_running(world, 3)
        deleting = asyncio.create_task(world.client.delete(f"/v1/adapters/sql?{query}"))
        while not all(stream.is_aborted for stream in world.engine.streams):
            await asyncio.sleep(0.001)
        world.engine.gate.set()
        deleted = await deleting
        assert (deleted.status_code, deleted.json()["state"]) == (200, "unloaded")
        assert deleted.json()["freed"]["host_bytes"] == adapter["num_bytes"]
        reply = await whole
        error = reply.json()["error"]
        assert (reply.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
        assert "mode=abort" in error["message"] or "deleted" in error["message"]
        lines = await streamed
        assert sum('"error"' in line for line in lines) == 1 and "data: [DONE]" not in lines
        assert '"model_not_found"' in lines[-1] and '"error"' in lines[-1]


async def test_draining_answers_202_and_requests_finish(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        adapter = await load(world, "sql", world.adapter("a"))
        world.engine.gate.clear()
        running = asyncio.create_task(world.client.post("/v1/completions", json=ASK))
        await until_running(world, 1)
        deleted = await world.client.delete("/v1/adapters/sql")
        assert (deleted.status_code, deleted.json()["state"]) == (202, "draining")
        assert deleted.json()["freed"] == {"host_bytes": 0, "device_bytes": 0}
        (listed,) = (await world.client.get("/v1/adapters")).json()["data"]
        assert (listed["state"], listed["version"], listed["leases"]) == ("draining", adapter["version"], 1)
        assert (await world.refused("POST", "/v1/completions", json=ASK))[0] == 404
        world.engine.gate.set()
        assert (await running).status_code == 200
        await world.settle()
        assert (await world.client.get("/v1/adapters")).json()["data"] == []
