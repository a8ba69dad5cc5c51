"""POST /v1/adapters/upload: a multipart body as it comes, kept whole or not at all."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save

from adapters.adapter_folder import WEIGHTS_NAME
from adapters.lora_config import CONFIG_NAME
from tests.api.adapter_world import QUOTA, AdapterWorld, adapter_world

pytestmark = pytest.mark.asyncio

PATH = "/v1/adapters/upload?name=org/sql&wait=600"


def files_of(folder: str) -> dict[str, tuple[str, bytes]]:
    return {name: (name, (Path(folder) / name).read_bytes()) for name in (CONFIG_NAME, WEIGHTS_NAME)}


def encoded(files: dict[str, tuple[str, bytes]]) -> tuple[dict[str, str], bytes]:
    request = httpx.Request("POST", "http://test", files=files)
    request.read()
    return {"content-type": request.headers["content-type"]}, request.content


def nothing_kept(world: AdapterWorld) -> bool:
    incoming = world.folder / ".state" / "uploads" / "incoming"
    left = [path for path in incoming.rglob("*") if path.is_file()]
    return not world.uploads.ids() and not left and not world.service.directory.records


async def test_an_upload_is_served(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        files = files_of(world.adapter("a"))
        reply = await world.client.post(PATH + "&pin=true&ttl=60&priority=2", files=files)
        body = reply.json()
        assert (reply.status_code, body["outcome"], body["name"]) == (201, "loaded", "org/sql")
        assert (body["pin"], body["ttl"], body["priority"], body["state"]) == (True, 60.0, 2, "ready")
        (upload_id,) = world.uploads.ids()
        assert body["source"] == f"upload:{upload_id}"
        again = await world.client.post(PATH, files=files)
        assert (again.status_code, again.json()["outcome"]) == (200, "unchanged")
        assert world.uploads.ids() == {upload_id}
        other = files_of(world.adapter("b", 1))
        status, error = await world.refused("POST", PATH, files=other)
        assert (status, error["code"]) == (400, "adapter_already_loaded")
        replaced = await world.client.post(PATH + "&load_inplace=true", files=other)
        assert (replaced.status_code, replaced.json()["outcome"]) == (200, "replaced")
        asked = {"model": "org/sql", "prompt": "x", "max_tokens": 2}
        answered = await world.client.post("/v1/completions", json=asked)
        assert answered.headers["x-loramux-adapter-version"] == replaced.json()["version"]


async def test_without_wait_an_upload_is_acknowledged(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        files = files_of(world.adapter("a"))
        reply = await world.client.post("/v1/adapters/upload?name=sql", files=files)
        assert (reply.status_code, reply.json()["state"]) == (202, "fetching")
        await world.settle()
        assert (await world.client.get("/v1/adapters/sql")).json()["state"] == "ready"


async def test_a_body_in_small_pieces(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        headers, body = encoded(files_of(world.adapter("a")))

        async def pieces() -> AsyncIterator[bytes]:
            for at in range(0, len(body), 7):
                yield body[at : at + 7]

        assert (await world.client.post(PATH, content=pieces(), headers=headers)).status_code == 201


@pytest.mark.parametrize("share", [0.0, 0.3, 0.95])
async def test_a_body_that_ends_early_is_refused(tmp_path: Path, share: float) -> None:
    async with adapter_world(tmp_path) as world:
        headers, body = encoded(files_of(world.adapter("a")))
        status, error = await world.refused("POST", PATH, content=body[: int(len(body) * share)], headers=headers)
        assert (status, error["code"]) == (400, "adapter_upload_invalid")
        assert nothing_kept(world)


async def test_a_client_that_leaves_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        headers, body = encoded(files_of(world.adapter("a")))
        parts: list[dict[str, Any]] = [
            {"type": "http.disconnect"},
            {"type": "http.request", "body": body[: len(body) // 2], "more_body": True},
        ]
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            return parts.pop()

        async def send(message: Any) -> None:
            sent.append(message)

        path, _, query = PATH.partition("?")
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": path, "raw_path": path.encode(), "query_string": query.encode(), "root_path": "",
            "headers": [(b"content-type", headers["content-type"].encode())], "client": None, "server": ("test", 80),
            "state": {},
        }  # fmt: skip
        await world.app(scope, receive, send)  # type: ignore[arg-type]
        assert sent[0]["status"] == 499
        assert nothing_kept(world)


async def test_a_body_that_stops_coming_is_408(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.api.json_request.STALL_SECONDS", 0.02)
    async with adapter_world(tmp_path) as world:
        headers, body = encoded(files_of(world.adapter("a")))

        async def pieces() -> AsyncIterator[bytes]:
            yield body[:100]
            await asyncio.sleep(3600)

        status, error = await world.refused("POST", PATH, content=pieces(), headers=headers)
        assert (status, error["code"]) == (408, "request_timeout")
        assert nothing_kept(world)


@pytest.mark.parametrize(
    ("content_type", "status", "code"),
    [
        (None, 400, "adapter_upload_invalid"),
        ("application/json", 400, "adapter_upload_invalid"),
        ("multipart/form-data", 400, "adapter_upload_invalid"),
        ("multipart/form-data; boundary=", 400, "adapter_upload_invalid"),
        ("multipart/form-data; boundary=other", 400, "adapter_upload_invalid"),
        (f"multipart/form-data; boundary={'x' * 71}", 400, "adapter_upload_invalid"),
    ],
)
async def test_content_types(tmp_path: Path, content_type: str | None, status: int, code: str) -> None:
    async with adapter_world(tmp_path) as world:
        _, body = encoded(files_of(world.adapter("a")))
        headers = {} if content_type is None else {"content-type": content_type}
        got, error = await world.refused("POST", PATH, content=body, headers=headers)
        assert (got, error["code"]) == (status, code)
        assert nothing_kept(world)


async def test_a_compressed_body_is_refused(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        headers, body = encoded(files_of(world.adapter("a")))
        status, error = await world.refused("POST", PATH, content=body, headers={**headers, "content-encoding": "gzip"})
        assert status == 400 and "Content-Encoding" in error["message"]
        assert nothing_kept(world)


@pytest.mark.parametrize(
    "names",
    [
        [CONFIG_NAME],
        [WEIGHTS_NAME],
        [CONFIG_NAME, "../" + WEIGHTS_NAME],
        [CONFIG_NAME, WEIGHTS_NAME, "x.py"],
        [],
        [CONFIG_NAME, WEIGHTS_NAME, "more.safetensors"],
        [CONFIG_NAME, WEIGHTS_NAME, "special_tokens_map.json"],
        [CONFIG_NAME, WEIGHTS_NAME, "a/tokenizer.json"],
    ],
)
async def test_other_files_are_refused(tmp_path: Path, names: list[str]) -> None:
    async with adapter_world(tmp_path) as world:
        data = {name: content for name, (_, content) in files_of(world.adapter("a")).items()}
        files = {name: (name, data.get(Path(name).name, b"x")) for name in names} or {"a": ("nothing.txt", b"")}
        status, error = await world.refused("POST", PATH, files=files)
        assert (status, error["code"]) == (400, "adapter_upload_invalid")
        assert nothing_kept(world)


async def test_an_unknown_name_is_told_with_those_that_are_known(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        files = {**files_of(world.adapter("a")), "readme": ("README.md", b"x")}
        _, error = await world.refused("POST", PATH, files=files)
        for name in ("README.md", CONFIG_NAME, WEIGHTS_NAME, "adapters.safetensors", "shards", "chat_template.jinja"):
            assert name in error["message"]


async def test_shards_are_served_as_the_one_file(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        folder = Path(world.adapter("a"))
        one = await world.client.post(PATH, files=files_of(str(folder)))
        tensors = load_file(folder / WEIGHTS_NAME)
        index = {name: f"{name[-13:-7]}.safetensors" for name in tensors}
        assert len(set(index.values())) == 2
        shards = {
            file: (file, save({name: tensors[name] for name in tensors if index[name] == file}))
            for file in index.values()
        }
        config = {CONFIG_NAME: files_of(str(folder))[CONFIG_NAME]}
        named = {"index": ("model.safetensors.index.json", json.dumps({"weight_map": index}).encode())}
        apart = await world.client.post(PATH.replace("sql", "apart"), files={**shards, **config, **named})
        assert (one.status_code, apart.status_code) == (201, 201), apart.text
        assert apart.json()["version"] == one.json()["version"]
        assert apart.json()["source"] != one.json()["source"]


async def test_over_the_quota_is_507(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        files = files_of(world.adapter("a"))
        big = {**files, WEIGHTS_NAME: (WEIGHTS_NAME, bytes(QUOTA))}
        status, error = await world.refused("POST", PATH, files=big)
        assert (status, error["code"]) == (507, "adapter_storage_full")
        assert nothing_kept(world)
        assert (await world.client.post(PATH, files=files)).status_code == 201


async def test_too_large_a_config_says_which_limit(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        files = {CONFIG_NAME: (CONFIG_NAME, b" " * (2 << 20))}
        status, error = await world.refused("POST", PATH, files=files)
        assert status in (400, 507) and error["code"] in ("adapter_too_large", "adapter_storage_full")
        assert nothing_kept(world)


async def test_a_folder_that_cannot_be_served_is_refused_with_its_parts(tmp_path: Path) -> None:
    async with adapter_world(tmp_path) as world:
        files = {**files_of(world.adapter("a")), CONFIG_NAME: (CONFIG_NAME, b'{"peft_type": "LORA", "r": 99}')}
        status, error = await world.refused("POST", PATH, files=files)
        assert status == 400 and error["code"].startswith("adapter_")
        assert error.keys() >= {"feature", "tensor", "why", "fix"}
        assert not world.service.directory.records


@pytest.mark.parametrize(
    ("query", "param", "code"),
    [
        ("", "name", None), ("name=", "name", None), (f"name={'x' * 513}", "name", None),
        ("name=a%00b", None, "adapter_name_invalid"), ("name=%D1%81", None, "adapter_name_invalid"),
        ("name=org/base", None, "adapter_name_invalid"), ("name=sql&ttl=0", "ttl", None),
        ("name=sql&ttl=nan", "ttl", None), ("name=sql&ttl=1e10", "ttl", None),
        ("name=sql&priority=1.5", "priority", None), ("name=sql&priority=1000001", "priority", None),
        ("name=sql&pin=perhaps", "pin", None), ("name=sql&wait=601", "wait", None), ("name=sql&wait=-1", "wait", None),
    ],
)  # fmt: skip
async def test_what_is_wrong_is_said_before_the_body_is_read(
    tmp_path: Path, query: str, param: str | None, code: str | None
) -> None:
    async with adapter_world(tmp_path) as world:
        headers, _ = encoded(files_of(world.adapter("a")))

        async def never() -> AsyncIterator[bytes]:
            pytest.fail("the body was read")
            yield b""

        status, error = await world.refused("POST", f"/v1/adapters/upload?{query}", content=never(), headers=headers)
        assert (status, error["param"], error["code"]) == (400, param, code)
        assert nothing_kept(world)
