"""Load options over HTTP: tensors to ignore and the layout of experts, with every way to load and in what is told."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapters.base_walk import modules_of
from adapters.checkpoint import CheckpointLimits, load_lora_model
from adapters.lora_config import CONFIG_NAME
from adapters.read_options import MAX_PATTERN_CHARS, MAX_PATTERNS
from tests.adapters.hostile import WEIGHTS, draft
from tests.adapters.test_experts import MODELS, fresh
from tests.adapters.test_read_options import unmarked
from tests.api.adapter_world import AdapterWorld, adapter_world
from tests.api.test_adapter_life import load
from tests.server.fakes import TINY_BASE

pytestmark = pytest.mark.asyncio

EXTRA = "base_model.model.model.rotary_emb.inv_freq"
HALF = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def source(tmp_path: Path) -> str:
    """An adapter whose file also holds a buffer, which is refused."""
    drawn = draft(tmp_path / "a", TINY_BASE)
    drawn.tensors[EXTRA] = np.ones(4, dtype=np.float32)
    drawn.write()
    return str(tmp_path / "a")


async def refused(world: AdapterWorld, source: str, **body: Any) -> dict[str, Any]:
    status, error = await world.refused("POST", "/v1/adapters?wait=600", json={"name": "no", "source": source, **body})
    assert status == 400
    return error


async def test_what_is_ignored_is_told_wherever_the_adapter_is(tmp_path: Path, source: str) -> None:
    async with adapter_world(tmp_path) as world:
        assert EXTRA in (await refused(world, source))["message"]
        loaded = await load(world, "sql", source, ignore=["*.inv_freq"])
        assert (loaded["outcome"], loaded["report"]["ignored"]) == ("loaded", {EXTRA: 16})
        assert loaded["source"] == f"{source}#ignore=*.inv_freq"
        described = (await world.client.get("/v1/adapters/sql")).json()
        (listed,) = (await world.client.get("/v1/adapters")).json()["data"]
        assert described["report"]["ignored"] == listed["report"]["ignored"] == {EXTRA: 16}
        assert (await load(world, "plain", world.adapter("b")))["report"]["ignored"] == {}
        again = await load(world, "sql", described["source"])
        assert (again["outcome"], again["version"]) == ("unchanged", loaded["version"])


async def test_every_way_to_load_takes_them(tmp_path: Path, source: str) -> None:
    async with adapter_world(tmp_path) as world:
        version = (await load(world, "sql", source, ignore=["*.inv_freq"]))["version"]
        files = [("f", (name, (Path(source) / name).read_bytes())) for name in (CONFIG_NAME, WEIGHTS)]
        query = {"name": "sent", "wait": 600, "ignore": ["*.inv_freq", "*.rotary_emb.*"]}
        sent = await world.client.post("/v1/adapters/upload", params=query, files=files)
        assert (sent.status_code, sent.json()["version"]) == (201, version), sent.text
        assert sent.json()["report"]["ignored"] == {EXTRA: 16}
        path = "/v1/adapters/new/validate"
        checked = await world.client.post(path, json={"source": source, "ignore": ["*.inv_freq"]})
        assert (checked.json()["version"], checked.json()["ignored"]) == (version, {EXTRA: 16})
        body = {"lora_name": "vllm", "lora_path": f"{source}#ignore=*.inv_freq"}
        assert (await world.client.post("/v1/load_lora_adapter", json=body)).status_code == 200
        assert (await world.client.get("/v1/adapters/vllm")).json()["version"] == version


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"ignore": ["a"] * (MAX_PATTERNS + 1)}, "limit is 32"),
        ({"ignore": ["a" * (MAX_PATTERN_CHARS + 1)]}, "1 to 256"),
        ({"ignore": [""]}, "1 to 256"),
        ({"ignore": ["a\n"]}, "printable"),
        ({"ignore": ["é" * 250 + str(n) for n in range(9)]}, "4096"),
        ({"ignore": "*.inv_freq"}, "ignore"),
        ({"ignore": [1]}, "ignore"),
        ({"moe_lora_b_layout": "columns"}, "rank_major or grouped_by_expert"),
        ({"moe_lora_b_layout": 1}, "moe_lora_b_layout"),
    ],
)
async def test_options_that_are_none_are_told_at_once(
    tmp_path: Path, source: str, options: dict[str, Any], why: str
) -> None:
    async with adapter_world(tmp_path) as world:
        for path, more in (("/v1/adapters", {"name": "sql"}), ("/v1/adapters/sql/validate", {})):
            status, error = await world.refused("POST", path, json={"source": source, **more, **options})
            assert status == 400 and why in error["message"], error
        assert (await world.client.get("/v1/adapters")).json()["data"] == []


async def test_options_that_do_not_fit_the_files_are_refused_by_name(tmp_path: Path, source: str) -> None:
    async with adapter_world(tmp_path) as world:
        error = await refused(world, source, ignore=["*.inv_freq", "*.nothing"])
        assert (error["code"], error["feature"]) == ("adapter_key_unmatched", "ignore=*.nothing")
        assert (await refused(world, source, ignore=["*"]))["code"] == "adapter_key_unmatched"
        error = await refused(world, source, ignore=["*.inv_freq", HALF])
        assert error["code"] == "adapter_incomplete_pair" and "q_proj" in error["tensor"]
        error = await refused(world, source, ignore=["*.inv_freq"], moe_lora_b_layout="rank_major")
        assert error["feature"] == "moe_lora_b_layout=rank_major"
        error = await refused(world, f"{source}#ignore=*.inv_freq", ignore=["*.inv_freq"])
        assert error["code"] == "adapter_option_invalid"


async def test_null_and_nothing_are_no_options(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        source = world.adapter("a")
        plain = await load(world, "a", source)
        same = await load(world, "b", source, ignore=None, moe_lora_b_layout=None)
        none = await load(world, "c", source, ignore=[])
        assert plain["version"] == same["version"] == none["version"]
        assert plain["source"] == same["source"] == none["source"] == source


async def test_the_layout_of_experts_is_the_way_out_of_its_refusal(tmp_path: Path) -> None:
    unmarked("qwen3_moe", tmp_path / "a", grouped=True)
    source, limits = str(tmp_path / "a"), CheckpointLimits(max_lora_rank=8, max_adapter_bytes=1 << 20)
    base = modules_of(fresh(MODELS["qwen3_moe"]))
    read = partial(load_lora_model, base=base, limits=limits, dtype=torch.float32)
    async with adapter_world(tmp_path, read=read) as world:
        error = await refused(world, source)
        assert error["code"] == "adapter_ambiguous_layout" and "moe_lora_b_layout" in error["fix"]
        loaded = [
            await load(world, layout, source, moe_lora_b_layout=layout)
            for layout in ("rank_major", "grouped_by_expert")
        ]
        assert loaded[0]["version"] != loaded[1]["version"]
        assert loaded[1]["source"] == f"{source}#moe_lora_b_layout=grouped_by_expert"
        config = tmp_path / "a" / CONFIG_NAME
        config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_B_layout": "grouped_by_expert"}))
        assert (await load(world, "marked", source))["version"] == loaded[1]["version"]
