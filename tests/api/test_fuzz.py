"""Whatever JSON is sent to the inference routes, the answer is a reply or four keys of a client's error; never a 5xx,
and nothing is left running.
"""

import asyncio
import json
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.api.protocol import ChatRequest, CompletionRequest
from server.api.unsupported import is_one_of
from tests.api.conftest import World, client_for
from tests.api.fakes import BASE

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.integers(-3, 9), st.floats(allow_nan=False),
    st.text(max_size=20), st.sampled_from([BASE, "sql", f"{BASE}:sql", "user", "text", "", "\x00", "\r\n\x1b[31m"]),
)  # fmt: skip
JSON_VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
FIELDS = sorted({*CompletionRequest.model_fields, *ChatRequest.model_fields, "tools", "lora", "response_format"})


def reasonable(path: str) -> dict[str, Any]:
    required: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"}
    return {"model": BASE, "max_tokens": 3, **required}


async def send(world: World, path: str, body: Any) -> tuple[int, str]:
    async with client_for(world.app) as client:
        response = await client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    return response.status_code, response.text


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from(["/v1/completions", "/v1/chat/completions"]),
    changes=st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES, max_size=3),
    whole=st.none() | JSON_VALUES,
)
def test_any_json_gets_an_orderly_answer(world: World, path: str, changes: dict[str, Any], whole: Any) -> None:
    body = reasonable(path) | changes if whole is None else whole
    status, text = asyncio.run(send(world, path, body))
    assert status in (200, 400, 404), text
    if status != 200:
        assert set(json.loads(text)["error"]) == {"message", "type", "param", "code"}
        assert len(text) < 2048
    world.check_idle()
    world.engine.streams.clear()


@given(value=SCALARS)
def test_neutral_values_are_compared_with_their_type(value: Any) -> None:
    assert not is_one_of(value, (True,)) or value is True
    assert not is_one_of(value, (0,)) or type(value) is int
    assert is_one_of(value, (value,))
