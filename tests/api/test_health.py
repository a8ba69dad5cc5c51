"""/health, /version and /metrics are open and true."""

from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.config import HTTPConfig
from tests.api.adapter_world import adapter_world


@pytest.mark.asyncio
async def test_open_without_a_key(tmp_path: Path) -> None:
    async with adapter_world(tmp_path, HTTPConfig(api_key="k", admin_api_key="a")) as world:
        for path in ("/health", "/version", "/metrics"):
            assert (await world.client.get(path)).status_code == 200, path


@pytest.mark.asyncio
async def test_health_follows_the_engine(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        assert (await world.client.get("/health")).json() == {"status": "ok"}
        assert (await world.client.head("/health")).status_code == 200
        world.engine.is_healthy = False
        reply = await world.client.get("/health")
        assert reply.status_code == 503
        assert (await world.client.head("/health")).status_code == 503
        assert reply.json()["error"]["code"] == "server_unavailable"
        assert "retry-after" in reply.headers


@pytest.mark.asyncio
async def test_metrics_parse_and_name_the_adapters(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        await world.service.load("sql", world.adapter("a"))
        reply = await world.client.get("/metrics")
        assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
        families = {family.name: family for family in text_string_to_metric_families(reply.text)}
        loaded = families["vllm:lora_adapter_loaded"].samples
        assert [(s.labels["adapter_name"], s.labels["level"], s.labels["rank"]) for s in loaded] == [
            ("sql", "cpu", "4")
        ]
        assert not [name for name in families if name.endswith("_created")]


@pytest.mark.asyncio
async def test_version_is_a_string(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        body = (await world.client.get("/version")).json()
        assert body.keys() == {"version"} and isinstance(body["version"], str) and body["version"]
