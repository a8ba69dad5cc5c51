"""s3:// against a real object server on this machine, and gs:// and az:// as far as that goes without one."""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch

from adapters.adapter_ref import AdapterVersion
from adapters.checkpoint import CheckpointLimits, load_lora_model
from adapters.errors import AdapterError, AdapterNotFound, AdapterRefused
from server.lifecycle.sources.errors import AdapterSourceNotAllowed, AdapterSourceUnreachable
from server.lifecycle.sources.sources import SourceLimits, Sources
from tests.adapters.hostile import WEIGHTS, healthy
from tests.server.fakes import TINY_BASE
from tests.server.lifecycle.web_server import WebServer, status, web_server

obstore = pytest.importorskip("obstore")
moto_server = pytest.importorskip("moto.server")

LIMITS = CheckpointLimits(max_lora_rank=16, max_adapter_bytes=1 << 20)
SECRETS = {"AWS_ACCESS_KEY_ID": "AKIAHUNTER1", "AWS_SECRET_ACCESS_KEY": "hunter2", "AWS_SESSION_TOKEN": "hunter3"}
ALLOWED = ("s3://adapters/team", "s3://absent", "gs://bucket", "az://container")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in {**SECRETS, "AWS_REGION": "us-east-1", "AWS_ALLOW_HTTP": "true"}.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.fixture
def sources(tmp_path: Path) -> Iterator[Sources]:
    limits = SourceLimits(max_bytes=1 << 20, timeout=2, max_seconds=20)
    sources = Sources(allowed_urls=ALLOWED, staging=tmp_path / "staging", limits=limits)
    yield sources
    assert list(tmp_path.glob("staging/*/*")) == []
    sources.close()


@pytest.fixture
def bucket(endpoint: str, environment: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A bucket with the adapter team/sql, and a neighbour that is not allowed; returns the adapter's folder."""
    environment.setenv("AWS_ENDPOINT_URL", endpoint)
    folder = healthy(tmp_path / "adapter", TINY_BASE)
    with_bucket = obstore.store.S3Store("adapters", endpoint=endpoint, client_options={"allow_http": True})
    _make_bucket(endpoint)
    for prefix in ("team/sql", "team/ü b", "team-private/x"):
        for path in folder.iterdir():
            obstore.put(with_bucket, f"{prefix}/{path.name}", path)
    return folder


def _make_bucket(endpoint: str) -> None:
    boto3 = pytest.importorskip("boto3")
    boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket="adapters")


async def load(sources: Sources, source: str) -> AdapterVersion:
    async with sources.fetched(source) as folder:
        return load_lora_model(folder, TINY_BASE, limits=LIMITS, dtype=torch.float32).model.version


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["sql", "ü b", "sql/"])
async def test_a_folder_of_a_bucket(name: str, bucket: Path, sources: Sources) -> None:
    wanted = load_lora_model(bucket, TINY_BASE, limits=LIMITS, dtype=torch.float32).model.version
    reports: list[tuple[int, int | None]] = []
    async with sources.fetched(f"s3://adapters/team/{name}", lambda *report: reports.append(report)) as folder:
        assert load_lora_model(folder, TINY_BASE, limits=LIMITS, dtype=torch.float32).model.version == wanted
    total = sum(path.stat().st_size for path in bucket.iterdir())
    assert reports[-1] == (total, total)


@pytest.mark.asyncio
async def test_what_is_not_there_or_not_allowed(bucket: Path, sources: Sources) -> None:
    for source in ("s3://adapters/team/none", "s3://absent/x"):
        with pytest.raises(AdapterNotFound, match="is not there, or"):
            await load(sources, source)
    with pytest.raises(AdapterSourceNotAllowed):
        await load(sources, "s3://adapters/team-private/x")


@pytest.mark.asyncio
async def test_what_is_too_large_is_not_downloaded(bucket: Path, tmp_path: Path) -> None:
    limits = SourceLimits(max_bytes=100)
    small = Sources(allowed_urls=ALLOWED, staging=tmp_path / "staging", limits=limits)
    reports: list[tuple[int, int | None]] = []
    with pytest.raises(AdapterRefused, match=f"{WEIGHTS} has"):
        async with small.fetched("s3://adapters/team/sql", lambda *report: reports.append(report)):
            pass
    assert all(done < 1000 for done, _ in reports)
    small.close()


@pytest.fixture
def broken() -> Iterator[WebServer]:
    """An object server that repeats the credentials in all it says."""
    with web_server() as web:
        yield web


@pytest.mark.asyncio
@pytest.mark.parametrize("code", [400, 401, 403, 404, 500, 503])
async def test_credentials_are_never_repeated(
    code: int, broken: WebServer, sources: Sources, environment: pytest.MonkeyPatch
) -> None:
    environment.setenv("AWS_ENDPOINT_URL", broken.url)
    told = "".join(f"<{name}>{value}</{name}>" for name, value in SECRETS.items())
    broken.fallback = status(code, f"<Error><Code>X</Code><Message>{told}</Message></Error>".encode())
    with pytest.raises(AdapterError) as caught:
        await load(sources, "s3://adapters/team/sql")
    assert caught.value.status in (404, 503)
    assert caught.value.status == 404 or f"(status {code})" in str(caught.value)
    assert any("AKIAHUNTER1" in headers.get("authorization", "") for _, headers in broken.requests), "it was asked"
    assert "hunter" not in f"{caught.value!r} {caught.value} {caught.value.__cause__}".lower()
    assert caught.value.__suppress_context__


@pytest.mark.asyncio
async def test_nobody_listens(sources: Sources, environment: pytest.MonkeyPatch) -> None:
    with web_server() as web:
        environment.setenv("AWS_ENDPOINT_URL", web.url)
    with pytest.raises(AdapterSourceUnreachable, match="s3://adapters/team/sql/adapter_config.json cannot be read"):
        await load(sources, "s3://adapters/team/sql")


@pytest.mark.asyncio
async def test_stores_that_are_not_set_up(sources: Sources, environment: pytest.MonkeyPatch) -> None:
    """Google's store without any credentials, Azure's without an account: said, not crashed."""
    environment.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", "hunter2 is no JSON")
    for source in ("gs://bucket/x", "az://container/x"):
        with pytest.raises(AdapterSourceUnreachable, match=f"{source}.* cannot be read") as caught:
            await load(sources, source)
        assert "hunter2" not in str(caught.value)


@pytest.mark.asyncio
async def test_gs_and_az_ask_their_stores(
    broken: WebServer, bucket: Path, sources: Sources, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Their services' own paths, answered from the adapter's folder."""
    wanted = load_lora_model(bucket, TINY_BASE, limits=LIMITS, dtype=torch.float32).model.version
    stamp = {"Last_Modified": "Mon, 23 Nov 2026 10:00:00 GMT", "ETag": '"1"'}
    files = {
        f"{at}/team/sql/{path.name}": status(200, path.read_bytes(), **stamp)
        for path in bucket.iterdir()
        for at in ("/bucket", "/account/container")
    }
    broken.fallback = lambda handler: files.get(unquote(handler.path), status(404, b""))(handler)
    key = '{"gcs_base_url": "%s", "disable_oauth": true, "client_email": "", "private_key": "", "private_key_id": ""}'
    environment.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", key % broken.url)
    environment.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    environment.setenv("AZURE_STORAGE_ENDPOINT", f"{broken.url}/account")
    environment.setenv("AZURE_SKIP_SIGNATURE", "true")
    environment.setenv("AZURE_ALLOW_HTTP", "true")
    environment.setenv("GOOGLE_ALLOW_HTTP", "true")
    for source in ("gs://bucket/team/sql", "az://container/team/sql"):
        assert await load(sources, source) == wanted, broken.paths
