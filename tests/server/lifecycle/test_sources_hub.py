"""hf:// through huggingface_hub against a server that speaks the hub's endpoints."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch

from adapters.adapter_ref import AdapterVersion
from adapters.checkpoint import CheckpointLimits, load_lora_model
from adapters.errors import AdapterError, AdapterNotFound, AdapterRefused
from adapters.lora_config import CONFIG_NAME
from server.lifecycle.sources.errors import AdapterSourceNotAllowed, AdapterSourceUnreachable
from server.lifecycle.sources.sources import SourceLimits, Sources
from tests.adapters.hostile import WEIGHTS, healthy
from tests.server.fakes import TINY_BASE
from tests.server.lifecycle.web_server import Answer, WebServer, cut_off, hanging, redirect, status, web_server, whole

LIMITS = CheckpointLimits(max_lora_rank=16, max_adapter_bytes=1 << 20)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """`web` is the hub, `cdn` another host, where it redirects to for the weights as the real one does."""

    place: Path
    web: WebServer
    cdn: WebServer
    made: list[Sources] = field(default_factory=list)

    def sources(self, allowed: tuple[str, ...] = ("hf://org",), timeout: float = 10, **extra: Any) -> Sources:
        limits = SourceLimits(max_bytes=1 << 20, timeout=timeout)
        endpoint = extra.pop("hub_endpoint", self.web.url)
        staging = self.place / "staging"
        self.made.append(Sources(allowed_urls=allowed, staging=staging, limits=limits, hub_endpoint=endpoint, **extra))
        return self.made[-1]

    async def load(self, source: str, sources: Sources | None = None) -> AdapterVersion:
        async with (sources or self.sources()).fetched(source) as folder:
            return load_lora_model(folder, TINY_BASE, limits=LIMITS, dtype=torch.float32).model.version

    def publish(self, folder: Path, repo: str, *, revision: str = "main", subfolder: str = "", **info: Any) -> None:
        """Under the revision's own route, as the client asks for it, and under the hub's default one."""
        files = {f"{subfolder}{path.name}": path.read_bytes() for path in folder.iterdir()}
        siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
        body = json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings, **info}).encode()
        self.web.answers[f"/api/models/{repo}/revision/{revision}"] = whole(body)
        if revision == "main":
            self.web.answers[f"/api/models/{repo}"] = whole(body)
        for name, data in files.items():
            self.web.answers[f"/{repo}/resolve/{COMMIT}/{name}"] = whole(data)
        weights = f"/{repo}/resolve/{COMMIT}/{subfolder}{WEIGHTS}"
        self.cdn.answers["/blob"] = whole((folder / WEIGHTS).read_bytes())
        self.web.answers[weights] = redirect(f"http://localhost:{self.cdn.port}/blob?X-Signature=s")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with web_server() as web, web_server() as cdn:
        hub = Hub(tmp_path, web, cdn)
        hub.publish(healthy(tmp_path / "adapter", TINY_BASE), "org/repo")
        yield hub
        web.over.set()
        for sources in hub.made:
            sources.close()
        assert list((tmp_path / "staging").iterdir()) == []
        assert not (tmp_path / "cache").exists()


def wanted(hub: Hub) -> AdapterVersion:
    return load_lora_model(hub.place / "adapter", TINY_BASE, limits=LIMITS, dtype=torch.float32).model.version


@pytest.mark.asyncio
async def test_a_repo(hub: Hub) -> None:
    for name in ("README.md", "optimizer.pt", "tokenizer.json"):
        (hub.place / "adapter" / name).write_text("x")
    hub.publish(hub.place / "adapter", "org/repo")
    reports: list[tuple[int, int | None]] = []
    async with hub.sources().fetched("hf://org/repo", lambda *report: reports.append(report)) as folder:
        assert {path.name for path in folder.path.iterdir()} == {CONFIG_NAME, WEIGHTS, "tokenizer.json"}
    assert await hub.load("hf://org/repo") == wanted(hub)
    total = sum((hub.place / "adapter" / name).stat().st_size for name in (CONFIG_NAME, WEIGHTS, "tokenizer.json"))
    assert reports[-1] == (total, total)


@pytest.mark.asyncio
@pytest.mark.parametrize("revision", ["v1.0", COMMIT, "refs%2Fpr%2F1"])
async def test_revisions_and_subfolders(hub: Hub, revision: str) -> None:
    other = healthy(hub.place / "other", TINY_BASE, seed=9)
    hub.publish(other, "org/repo", revision=revision, subfolder="checkpoints/7/")
    source = f"hf://org/repo@{revision}/checkpoints/7"
    version = load_lora_model(other, TINY_BASE, limits=LIMITS, dtype=torch.float32).model.version
    assert await hub.load(source) == version
    with pytest.raises(AdapterNotFound):
        await hub.load(f"hf://org/repo@{revision}")


@pytest.mark.asyncio
async def test_nothing_is_sent_but_requests_for_the_files_and_the_token_to_the_hub_alone(hub: Hub) -> None:
    assert await hub.load("hf://org/repo", hub.sources(hub_token="hf_hunter2")) == wanted(hub)
    assert [path.partition("?")[0] for path in hub.web.paths] == [
        "/api/models/org/repo",
        f"/org/repo/resolve/{COMMIT}/{CONFIG_NAME}",
        f"/org/repo/resolve/{COMMIT}/{WEIGHTS}",
    ]
    for _, headers in hub.web.requests:
        assert headers["authorization"] == "Bearer hf_hunter2"
        assert headers["user-agent"] == "loramux"
    assert hub.cdn.paths == ["/blob?X-Signature=s"]
    assert "hunter2" not in str(hub.cdn.requests)


@pytest.mark.asyncio
async def test_a_repo_that_moved_must_be_allowed_under_its_new_name(hub: Hub) -> None:
    hub.publish(hub.place / "adapter", "org/repo", id="evil/repo")
    with pytest.raises(AdapterSourceNotAllowed, match="evil/repo"):
        await hub.load("hf://org/repo")
    assert not any("resolve" in path for path in hub.web.paths)
    assert await hub.load("hf://org/repo", hub.sources(("hf://",))) == wanted(hub)
    hub.publish(hub.place / "adapter", "org/repo", id="Org/Repo")  # the hub's own spelling
    assert await hub.load("hf://org/repo") == wanted(hub)


INFO_FAILURES: dict[str, tuple[Answer, type[AdapterError], str]] = {
    "no repo": (status(404, X_Error_Code="RepoNotFound"), AdapterNotFound, "no such repo"),
    "no repo, without a token": (status(401, X_Error_Code="RepoNotFound"), AdapterNotFound, "token"),
    "gated": (status(403, X_Error_Code="GatedRepo"), AdapterNotFound, "token"),
    "no revision": (status(404, X_Error_Code="RevisionNotFound"), AdapterNotFound, "revision"),
    "busy": (status(429), AdapterSourceUnreachable, "429"),
    "broken": (status(500, b"hunter2"), AdapterSourceUnreachable, "500"),
    "silent": (hanging(b"{", 100), AdapterSourceUnreachable, "reached"),
    "not JSON": (whole(b"<html>"), AdapterSourceUnreachable, "reached"),
    "not an object": (whole(b"[1]"), AdapterSourceUnreachable, "reached"),
    "other fields": (whole(b'{"x": 1}'), AdapterSourceUnreachable, "reached"),
    "no files": (whole(json.dumps({"id": "org/repo", "sha": COMMIT}).encode()), AdapterNotFound, CONFIG_NAME),
}


@pytest.mark.asyncio
@pytest.mark.parametrize("case", INFO_FAILURES)
async def test_failures_of_the_hub(hub: Hub, case: str) -> None:
    answer, kind, text = INFO_FAILURES[case]
    hub.web.answers["/api/models/org/repo"] = answer
    with pytest.raises(kind, match=text) as caught:
        await hub.load("hf://org/repo", hub.sources(timeout=0.5, hub_token="hf_hunter2"))
    assert "hunter2" not in str(caught.value)


FILE_FAILURES: dict[str, tuple[Answer, type[AdapterError]]] = {
    "gone": (status(404, X_Error_Code="EntryNotFound"), AdapterNotFound),
    "forbidden": (status(403), AdapterNotFound),
    "broken": (status(502), AdapterSourceUnreachable),
    "silent": (hanging(b"x", 100), AdapterSourceUnreachable),
    "broken off": (cut_off(b"x" * 10, 100), AdapterSourceUnreachable),
    "shorter than the hub said": (whole(b"x"), AdapterSourceUnreachable),
    "in a ring": (redirect("/ring"), AdapterSourceUnreachable),
}


@pytest.mark.asyncio
@pytest.mark.parametrize("case", FILE_FAILURES)
async def test_failures_of_a_file(hub: Hub, case: str) -> None:
    answer, kind = FILE_FAILURES[case]
    hub.web.answers["/ring"] = redirect("/ring")
    hub.web.answers[f"/org/repo/resolve/{COMMIT}/{WEIGHTS}"] = answer
    with pytest.raises(kind):
        await hub.load("hf://org/repo", hub.sources(timeout=0.5))
    assert list(hub.place.glob("staging/*/*")) == []


@pytest.mark.asyncio
async def test_what_is_too_large_is_not_asked_for(hub: Hub) -> None:
    files = [{"rfilename": CONFIG_NAME, "size": 10}, {"rfilename": WEIGHTS, "size": 1 << 40}]
    info = json.dumps({"id": "org/repo", "sha": COMMIT, "siblings": files}).encode()
    hub.web.answers["/api/models/org/repo"] = whole(info)
    hub.web.answers[f"/org/repo/resolve/{COMMIT}/{CONFIG_NAME}"] = whole(b"0123456789")
    with pytest.raises(AdapterRefused, match=str(1 << 40)):
        await hub.load("hf://org/repo")


@pytest.mark.asyncio
async def test_offline_and_unreachable(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with web_server() as gone:
        url = gone.url
    with pytest.raises(AdapterSourceUnreachable, match="cannot be reached") as caught:
        await hub.load("hf://org/repo", hub.sources(hub_endpoint=url))
    assert caught.value.retry_after > 0
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(AdapterSourceUnreachable, match="HF_HUB_OFFLINE"):
        await hub.load("hf://org/repo")
