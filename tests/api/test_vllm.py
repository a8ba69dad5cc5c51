"""vLLM's adapter routes, case by case: status, type, message."""

from pathlib import Path
from typing import Any

import pytest

from server.lifecycle.sources.errors import AdapterSourceUnreachable
from tests.adapters.hostile import write_config
from tests.api.adapter_world import AdapterWorld, adapter_world


async def load(world: AdapterWorld, **body: Any) -> tuple[int, Any]:
    return await _post(world, "/v1/load_lora_adapter", body)


async def unload(world: AdapterWorld, **body: Any) -> tuple[int, Any]:
    return await _post(world, "/v1/unload_lora_adapter", body)


async def _post(world: AdapterWorld, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    reply = await world.client.post(path, json=body)
    is_text = reply.headers["content-type"].startswith("text/plain")
    assert is_text == (reply.status_code == 200)
    return reply.status_code, reply.text if is_text else reply.json()


@pytest.mark.asyncio
async def test_load_and_unload(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        path = world.adapter("a")
        added = (200, "Success: LoRA adapter 'sql' added successfully.")
        assert await load(world, lora_name="sql", lora_path=path) == added
        assert await load(world, lora_name="sql", lora_path=path) == added  # the same bytes: idempotent
        other = world.adapter("b", seed=1)
        assert await load(world, lora_name="sql", lora_path=other, load_inplace=True) == added
        removed = (200, "Success: LoRA adapter 'sql' removed successfully.")
        assert await unload(world, lora_name="sql", lora_int_id=7) == removed


@pytest.mark.asyncio
async def test_errors_as_in_vllm(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        path = world.adapter("a")
        await load(world, lora_name="sql", lora_path=path)
        both = "Both 'lora_name' and 'lora_path' must be provided."
        taken = (
            "The lora adapter 'sql' has already been loaded. If you want to load the adapter in place, set "
            "'load_inplace' to True."
        )
        invalid = "InvalidUserInput"
        cases: list[tuple[Any, int, str, str]] = [
            (load(world, lora_name="", lora_path=path), 400, invalid, both),
            (load(world, lora_name="x"), 400, invalid, both),
            (load(world, lora_name=None, lora_path=path), 400, invalid, both),
            (load(world, lora_name="x", lora_path=None, load_inplace=None), 400, invalid, both),
            (
                load(world, lora_name="org/base", lora_path=path),
                400,
                invalid,
                "The lora adapter 'org/base' conflicts with a served base model.",
            ),
            (load(world, lora_name="sql", lora_path=world.adapter("b", seed=1)), 400, invalid, taken),
            (load(world, lora_name="x", lora_path=str(tmp_path / "no")), 404, "NotFoundError", "no"),
            (unload(world, lora_name=None), 400, invalid, "'lora_name' needs to be provided to unload a LoRA adapter."),
            (unload(world), 400, invalid, "'lora_name' needs to be provided to unload a LoRA adapter."),
            (unload(world, lora_name="x"), 404, "NotFoundError", "The lora adapter 'x' cannot be found."),
            (load(world, lora_name="x", lora_path=path, is_3d_lora_weight=True), 400, invalid, "is_3d_lora_weight"),
        ]
        for call, status, error_type, message in cases:
            got, body = await call
            error = body["error"]
            assert (got, error["type"]) == (status, error_type), error
            assert message == error["message"] or (len(message) < 20 and message in error["message"])
            assert body["message"] == error["message"]
            assert {"message", "type", "param", "code"} <= error.keys()
        counted = [line for line in world.metrics.render().decode().splitlines() if "errors_total{" in line]
        assert sum(float(line.rpartition(" ")[2]) for line in counted) == len(cases)


@pytest.mark.asyncio
async def test_refusal_is_400_with_its_parts(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        path = world.adapter("a")
        write_config(Path(path), {"peft_type": "LORA", "r": 64, "lora_alpha": 8})
        status, body = await load(world, lora_name="x", lora_path=path)
        assert status == 400
        assert body["error"]["code"].startswith("adapter_")
        assert body["error"].keys() >= {"feature", "tensor", "why", "fix"}
        assert "x" not in world.service.registry


@pytest.mark.asyncio
async def test_what_is_the_servers_fault_says_so_and_when_to_come_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with adapter_world(tmp_path) as world:

        async def away(name: str, source: str, **_: object) -> None:
            raise AdapterSourceUnreachable(f"{source} cannot be read")

        monkeypatch.setattr(world.service, "load", away)
        body = {"lora_name": "sql", "lora_path": "hf://org/sql"}
        reply = await world.client.post("/v1/load_lora_adapter", json=body)
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "10")
        assert reply.json()["error"]["type"] == "InternalServerError"
