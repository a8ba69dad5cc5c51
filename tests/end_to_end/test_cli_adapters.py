"""`loramux adapters …` against a whole server in this process: the commands and the routes they call fit together."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from loadtest.churn_adapters import write_sources
from server.adapter_client import AdapterClient
from server.cli import run
from server.config import (
    MIB,
    AdapterConfig,
    CacheConfig,
    EngineConfig,
    HTTPConfig,
    LoRALimits,
    ModelConfig,
    ServerConfig,
)
from tests.end_to_end.in_process import InProcessServer, free_port, in_process, save_tiny_model

Capture = pytest.CaptureFixture[str]
ADMIN = "admin-key"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """The model's, and three adapters'."""
    model = save_tiny_model(tmp_path_factory.mktemp("cli") / "model")
    return model, write_sources(tmp_path_factory.mktemp("sources"), model, 3)


@pytest.fixture(scope="module")
def server(folders: tuple[Path, list[Path]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcessServer]:
    config = ServerConfig(
        engine=EngineConfig(
            model=ModelConfig(model=str(folders[0]), dtype="float32", device="cpu"),
            cache=CacheConfig(kv_cache_memory=8 * MIB),
            lora=LoRALimits(lora_memory=8 * MIB, cpu_lora_memory=64 * MIB),
        ),
        adapters=AdapterConfig(state_dir=tmp_path_factory.mktemp("state")),
        http=HTTPConfig(port=free_port(), api_key="user-key", admin_api_key=ADMIN),
        served_model_names=("tiny",),
    )
    with in_process(config) as running:
        yield running
        running.check_integrity()


@pytest.fixture(autouse=True)
def environment(server: InProcessServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAMUX_URL", server.url)
    monkeypatch.setenv("LORAMUX_ADMIN_API_KEY", ADMIN)


def shown(capsys: Capture, *arguments: str) -> list[list[str]]:
    """The cells of the lines that a command printed."""
    assert run(["adapters", *arguments]) == 0, capsys.readouterr().err
    return [line.split("\t") for line in capsys.readouterr().out.splitlines()]


def refused(capsys: Capture, *arguments: str) -> str:
    assert run(["adapters", *arguments]) == 1
    return capsys.readouterr().err


def answered_by(server: InProcessServer, model: str) -> str:
    """The version behind a name."""
    reply = httpx.post(
        f"{server.url}/v1/completions",
        json={"model": model, "prompt": "x", "max_tokens": 2},
        headers={"authorization": "Bearer user-key"},
        timeout=60,
    )
    assert reply.status_code == 200, reply.text
    return reply.headers["x-loramux-adapter-version"]


def test_from_load_to_unload(server: InProcessServer, folders: tuple[Path, list[Path]], capsys: Capture) -> None:
    one, two, three = (str(folder) for folder in folders[1])
    _, row = shown(capsys, "load", "org/sql", one, "--pin", "--ttl", "1000", "--priority", "2")
    assert (row[0], row[4], row[7], row[8]) == ("org/sql", "ready", "pinned", one)
    first = json.loads("\n".join("\t".join(line) for line in shown(capsys, "describe", "org/sql", "--json")))
    assert (first["pin"], first["ttl"], first["priority"]) == (True, 1000.0, 2)
    assert row[1] == first["version"][:12]
    assert "has already been loaded" in refused(capsys, "load", "org/sql", two)
    _, row = shown(capsys, "load", "org/sql", two, "--load-inplace")
    assert row[1] != first["version"][:12]
    shown(capsys, "rollback", "org/sql")
    assert answered_by(server, "org/sql") == first["version"]
    shown(capsys, "unpin", "org/sql")
    assert not AdapterClient(server.url, ADMIN).describe("org/sql")["pin"]
    shown(capsys, "pin", "org/sql")
    assert AdapterClient(server.url, ADMIN).describe("org/sql")["pin"]

    header, row = shown(capsys, "upload", "sent", three)
    assert (row[0], row[4]) == ("sent", "ready") and row[8].startswith("upload:")
    assert header[0] == "name"

    shown(capsys, "alias", "best", "org/sql=90", "sent=10")
    assert shown(capsys, "alias")[1:] == [["best", "org/sql", "90"], ["best", "sent", "10"]]
    assert answered_by(server, "best") in (
        first["version"],
        AdapterClient(server.url, ADMIN).describe("sent")["version"],
    )
    pinned = shown(capsys, "alias", "best", f"org/sql@{first['version'][:8]}")
    assert pinned[1:] == [["best", f"org/sql@{first['version'][:12]}", "1"]]
    assert answered_by(server, "best") == first["version"]
    shown(capsys, "rollback", "best")
    assert "best" in refused(capsys, "unload", "sent")
    assert shown(capsys, "alias", "best", "--remove") == [["best is removed"]]

    assert [line[0] for line in shown(capsys, "ls")] == ["name", "org/sql", "sent"]
    ((line,),) = shown(capsys, "unload", "sent", "--mode", "abort")
    assert line.startswith("sent is unloaded")
    ((line,),) = shown(capsys, "unload", "org/sql", "--deadline", "0")
    assert "freed" in line
    assert shown(capsys, "ls") == [shown(capsys, "ls")[0]]


def test_what_the_server_refuses_is_told(server: InProcessServer, tmp_path: Path, capsys: Capture) -> None:
    assert "404" in refused(capsys, "load", "sql", str(tmp_path / "nowhere"))
    assert "404" in refused(capsys, "unload", "sql")
    assert "404" in refused(capsys, "describe", "sql")
    assert "404" in refused(capsys, "rollback", "sql")
    assert "400" in refused(capsys, "load", "../x", str(tmp_path))
    assert "404" in refused(capsys, "alias", "best", "nobody=1")
    assert "403" in refused(capsys, "ls", "--admin-api-key", "user-key")
    assert "401" in refused(capsys, "ls", "--admin-api-key", "wrong")


def test_a_load_that_is_not_waited_for(
    server: InProcessServer, folders: tuple[Path, list[Path]], capsys: Capture
) -> None:
    _, row = shown(capsys, "load", "later", str(folders[1][0]), "--no-wait")
    assert row[0] == "later"
    reached = AdapterClient(server.url, ADMIN)
    while reached.describe("later")["state"] != "ready":
        pass
    shown(capsys, "unload", "later")


def test_watching_shows_what_happens(server: InProcessServer, folders: tuple[Path, list[Path]]) -> None:
    client, seen = AdapterClient(server.url, ADMIN), list[tuple[str, str]]()
    began = threading.Event()

    def watch() -> None:
        for described in client.watch():
            began.set()
            seen.append((described["name"], described["state"]))
            if seen[-1] == ("seen", "unloaded"):
                return

    httpx.post(
        f"{server.url}/v1/adapters?wait=60",
        json={"name": "first", "source": str(folders[1][0])},
        headers={"authorization": f"Bearer {ADMIN}"},
    ).raise_for_status()
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    assert began.wait(60)
    assert run(["adapters", "load", "seen", str(folders[1][1])]) == 0
    answered_by(server, "seen")
    assert run(["adapters", "unload", "seen"]) == 0
    thread.join(60)
    assert not thread.is_alive()
    assert seen[0][0] == "first"
    assert {("seen", "ready"), ("seen", "unloaded")} <= set(seen)
    client.unload("first")
