"""/v1/models: base names first, cards as vLLM's, everything that `model` may say has a card."""

from pathlib import Path

import pytest

from server.config import HTTPConfig
from tests.api.adapter_world import BASES, adapter_world

CARD_KEYS = {"id", "object", "created", "owned_by", "root", "parent", "max_model_len", "permission"}


@pytest.mark.asyncio
async def test_base_first_then_adapters(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        for seed, name in enumerate(("zeta", "a/b:c")):
            await world.service.load(name, world.adapter(f"f{seed}", seed))
        data = (await world.client.get("/v1/models")).json()
        assert data["object"] == "list"
        assert [card["id"] for card in data["data"]] == [*BASES, "a/b:c", "zeta"]
        assert all(card.keys() == CARD_KEYS and card["max_model_len"] == 256 for card in data["data"])
        assert [(card["root"], card["parent"]) for card in data["data"]] == [
            ("/models/base", None),
            ("/models/base", None),
            (str(tmp_path / "f1"), BASES[0]),
            (str(tmp_path / "f0"), BASES[0]),
        ]


@pytest.mark.asyncio
async def test_one_card(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        await world.service.load("a/b:c", world.adapter("f"))
        for model, card_id in {
            **{base: base for base in BASES},
            "a/b:c": "a/b:c",
            "org/base:a/b:c": "a/b:c",
            "org%2Fbase%3Aa%2Fb%3Ac": "a/b:c",
        }.items():
            reply = await world.client.get(f"/v1/models/{model}")
            assert reply.status_code == 200, model
            assert reply.json()["id"] == card_id


@pytest.mark.asyncio
async def test_missing_model_and_draining_version_have_no_card(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        await world.service.load("gone", world.adapter("f"))
        lease = world.service.acquire("gone")
        await world.service.unload("gone")
        assert lease is not None
        assert [card["id"] for card in (await world.client.get("/v1/models")).json()["data"]] == [*BASES]
        reply = await world.client.get("/v1/models/gone")
        error = reply.json()["error"]
        assert reply.status_code == 404
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert "`gone`" in error["message"]
        lease.release()


@pytest.mark.asyncio
async def test_needs_the_api_key(tmp_path: Path) -> None:
    async with adapter_world(tmp_path, HTTPConfig(api_key="k")) as world:
        assert (await world.client.get("/v1/models")).status_code == 401
        headers = {"authorization": "Bearer k"}
        assert (await world.client.get("/v1/models", headers=headers)).status_code == 200
