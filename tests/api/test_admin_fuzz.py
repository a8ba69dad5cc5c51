"""Whatever JSON is sent to the admin routes, the answer is orderly, no 5xx, and what was served still is."""

import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.api.adapter_world import adapter_world
from tests.api.test_adapter_life import load
from tests.api.test_fuzz import JSON_VALUES, SCALARS

REASONABLE: dict[tuple[str, str], dict[str, Any]] = {
    ("POST", "/v1/adapters"): {"name": "new", "source": "/nowhere"},
    ("POST", "/v1/adapters?wait=60"): {"name": "new", "source": "/nowhere"},
    ("POST", "/v1/adapters/sql/validate"): {"source": "/nowhere"},
    ("PATCH", "/v1/adapters/sql"): {"pin": True},
    ("PUT", "/v1/aliases/best"): {"targets": [{"adapter": "sql", "weight": 1}]},
    ("POST", "/v1/load_lora_adapter"): {"lora_name": "new", "lora_path": "/nowhere"},
    ("POST", "/v1/unload_lora_adapter"): {"lora_name": "new"},
}
FIELDS = ["name", "source", "load_inplace", "pin", "ttl", "priority", "targets", "lora_path", "is_3d_lora_weight"]
TARGETS = st.lists(st.dictionaries(st.sampled_from(["adapter", "weight"]), SCALARS), max_size=20)
CALLS = st.tuples(
    st.sampled_from(sorted(REASONABLE)),
    st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES | TARGETS, max_size=3),
    st.none() | JSON_VALUES,
)


@settings(max_examples=20, deadline=None)
@given(st.lists(CALLS, max_size=12))
def test_any_json_gets_an_orderly_answer(calls: list[tuple[tuple[str, str], dict[str, Any], Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(_send_all(Path(folder), calls))


async def _send_all(folder: Path, calls: list[tuple[tuple[str, str], dict[str, Any], Any]]) -> None:
    async with adapter_world(folder) as world:
        version = (await load(world, "sql", world.adapter("a")))["version"]
        for (method, path), changes, whole in calls:
            body = REASONABLE[method, path] | changes if whole is None else whole
            headers = {"content-type": "application/json"}
            reply = await world.client.request(method, path, content=json.dumps(body), headers=headers)
            assert reply.status_code in (200, 201, 202, 400, 403, 404, 409), (method, path, body, reply.text)
            if reply.status_code >= 400:
                assert reply.json()["error"].keys() >= {"message", "type", "param", "code"}
                assert len(reply.text) < 8192
        asked = {"model": "sql", "prompt": "x", "max_tokens": 1}
        answered = await world.client.post("/v1/completions", json=asked)
        assert answered.headers["x-loramux-adapter-version"] == version
