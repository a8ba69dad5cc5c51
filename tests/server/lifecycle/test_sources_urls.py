"""What a source string names, and which URLs the allow-list lets through: every trick that readers of URLs know."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.errors import AdapterError, AdapterNotFound
from server.lifecycle.sources.address import (
    HubAddress,
    LocalAddress,
    UploadAddress,
    URLAddress,
    parse_source,
    parse_url,
    without_secrets,
)
from server.lifecycle.sources.allow_list import AllowList
from server.lifecycle.sources.errors import AdapterSourceInvalid, AdapterSourceNotAllowed, AdapterSourceUnsupported
from server.lifecycle.sources.source_template import SourceTemplate
from server.lifecycle.sources.sources import SourceLimits, Sources

ALLOWED = (
    "https://good.example.com/models/", "http://localhost:9000/a%20b", "s3://bucket/adapters", "gs://all-of-it",
    "az://container/x", "hf://good-org", "hf://other/repo@v1",
)  # fmt: skip


@pytest.mark.parametrize(
    ("source", "address"),
    {
        "/a/b": LocalAddress("/a/b"),
        "relative": LocalAddress("relative"),
        "file:///a/b%20c": LocalAddress("/a/b c"),
        "upload:" + "0a" * 32: UploadAddress("0a" * 32),
        "hf://org/repo": HubAddress(("org", "repo")),
        "hf://org/repo/": HubAddress(("org", "repo")),
        "hf://org/repo@main": HubAddress(("org", "repo"), "main"),
        "HF://org/repo@refs%2Fpr%2F1/sub/folder": HubAddress(("org", "repo", "sub", "folder"), "refs/pr/1"),
        "hf://org/repo/sub": HubAddress(("org", "repo", "sub")),
        "HTTPS://Good.Example.COM:443/a//".removesuffix("/"): URLAddress("https", "good.example.com", None, ("a",)),
        "http://127.0.0.1:8080/%C3%A9": URLAddress("http", "127.0.0.1", 8080, ("é",)),
        "https://[::1]:8/x": URLAddress("https", "[::1]", 8, ("x",)),
        "https://host": URLAddress("https", "host", None, ()),
        "s3://bucket/a b/ü/c=1": URLAddress("s3", "bucket", None, ("a b", "ü", "c=1")),
        "S3://bucket/x/": URLAddress("s3", "bucket", None, ("x",)),
        "gs://b_u.c-k/x": URLAddress("gs", "b_u.c-k", None, ("x",)),
        "az://container/x": URLAddress("az", "container", None, ("x",)),
    }.items(),
)
def test_sources_that_are_well_formed(source: str, address: object) -> None:
    assert parse_source(source) == address


def test_a_url_is_put_together_from_what_was_checked() -> None:
    address = parse_source("HTTP://Host:80/a%2Bb/%41/%C3%A9;x=1/")
    assert isinstance(address, URLAddress)
    assert address.file("f").url == "http://host/a%2Bb/A/%C3%A9%3Bx%3D1/f"
    assert parse_source(address.url) == address


@pytest.mark.parametrize(
    "source",
    (
        "https://", "https:///models", "https://user@good.example.com/models/x",
        "https://good.example.com@evil.com/models/x",
        "https://user:pass@good.example.com/models/x", "https://good.example.com:0/x",
        "https://good.example.com:99999/x",
        "https://good.example.com:/models/x", "https://good.example.com:443:1/x", "https://good.example.com:4４3/x",
        "https://good.example.com./models/x", "https://good..example.com/x", "https://.good.example.com/x",
        "https://good.example.com\\@evil.com/models/x", "https://good.example.com\\.evil.com/x", "https:\\\\evil.com/x",
        "https://evil.com#good.example.com/models/x", "https://evil.com?good.example.com/models/x",
        "https://good.example.com/models/x?token=1", "https://good.example.com/models/x#f",
        "https://good.example.com/models/x?",
        "https://good.example.com/models/../x", "https://good.example.com/models/./x",
        "https://good.example.com/models//x",
        "https://good.example.com//models/x", "https://good.example.com/models/%2e%2e/x",
        "https://good.example.com/models/%2E%2e/x",
        "https://good.example.com/models/.%2e/x", "https://good.example.com/models/%252e%252e/x",
        "https://good.example.com/models/a%2fb", "https://good.example.com/models/a%5cb",
        "https://good.example.com/models/%00",
        "https://good.example.com/models/%0d%0aHost:%20evil", "https://good.example.com/models/%ff",
        "https://good.example.com/mod els/x",
        "https://good.example.com/models/x\r\nHost: evil", "https://good.example.com/models/\tx",
        "https://good.example.com/models/é",
        "https://ɢood.example.com/models/x", "https://good。example.com/models/x", "https://good%2eexample.com/models/x",
        "https://[::1/x", "https://[fe80::1%25eth0]/x", "https://0x7f.1\u200b/x", " https://good.example.com/models/x",
        "https://good.example.com/models/x\u0000", "s3://", "s3:///adapters", "s3://Bucket/adapters",
        "s3://bucket@evil/adapters",
        "s3://bucket:80/adapters", "s3://bucket/adapters/../x", "s3://bucket/adapters/./x", "s3://bucket/adapters//x",
        "s3://bucket/adapters/%2e%2e/x", "s3://bucket/adapters?versionId=1", "s3://bucket/adapters#x",
        "s3://bucket/a\\b",
        "s3://bu..cket/x", "s3://bucket/a\nb", "hf://", "hf://org", "hf:///repo", "hf://org//repo",
        "hf://org/repo//sub",
        "hf://org/../x", "hf://org/repo/../x", "hf://org/repo/%2e%2e/x", "hf://org/repo@", "hf://org/repo@../x",
        "hf://org/repo@a..b",
        "hf://org/repo@main@x", "hf://org@main/repo", "hf://org/re po", "hf://org/repo?x", "hf://org/-repo",
        "hf://ｏrg/repo",
        "hf://org/repo@%2e%2e", "hf://org/repo@-x", "ftp://host/x", "s3a://bucket/x", "gopher://x/", "data://x",
        "memory:///x",
        "http+unix://x/y", "upload:xyz", "upload:" + "0" * 63, "upload:" + "A" * 64, "upload://" + "0" * 64,
    ),
)  # fmt: skip
def test_what_readers_of_urls_disagree_on_is_refused(source: str, tmp_path: Path) -> None:
    sources = Sources(
        roots=[tmp_path], allowed_urls=ALLOWED, staging=tmp_path / "s", limits=SourceLimits(max_bytes=1 << 20)
    )
    with pytest.raises(AdapterError) as caught:
        sources.check(source)
    assert isinstance(caught.value, AdapterSourceInvalid | AdapterNotFound | AdapterSourceNotAllowed)
    assert 400 <= caught.value.status < 500
    sources.close()


@pytest.mark.parametrize(
    ("source", "is_allowed"),
    {
        "https://good.example.com/models/sql": True,
        "https://GOOD.example.com:443/models/a/b": True,
        "https://good.example.com/%6dodels/sql": True,  # the same name
        "https://good.example.com/models": True,
        "https://good.example.com/models-private/sql": False,
        "https://good.example.com/Models/sql": False,
        "https://good.example.com/other": False,
        "https://good.example.com": False,
        "http://good.example.com/models/sql": False,
        "https://good.example.com:444/models/sql": False,
        "https://good.example.com.evil.com/models/sql": False,
        "https://evil-good.example.com/models/sql": False,
        "https://example.com/models/sql": False,
        "https://evil.com/good.example.com/models/sql": False,
        "http://localhost:9000/a%20b/x": True,
        "http://localhost:9001/a%20b/x": False,
        "http://127.0.0.1:9000/a%20b/x": False,
        "http://169.254.169.254/latest/meta-data": False,
        "s3://bucket/adapters/x": True,
        "s3://bucket/adapters-private/x": False,
        "s3://bucket-private/adapters/x": False,
        "s3://bucket": False,
        "gs://bucket/adapters/x": False,
        "gs://all-of-it/any/thing": True,
        "gs://all-of-it-not/any": False,
        "az://container/x/y": True,
        "az://container/y": False,
        "hf://good-org/any": True,
        "hf://good-org/any@v2/sub": True,
        "hf://good-org-evil/any": False,
        "hf://Good-org/any": False,
        "hf://other/repo@v1": True,
        "hf://other/repo@v1/sub": True,
        "hf://other/repo@v2": False,
        "hf://other/repo": False,
        "hf://third/repo": False,
    }.items(),
)
def test_the_allow_list_compares_parts(source: str, is_allowed: bool, tmp_path: Path) -> None:
    sources = Sources(allowed_urls=ALLOWED, staging=tmp_path / "s", limits=SourceLimits(max_bytes=1 << 20))
    if is_allowed:
        sources.check(source)
    else:
        with pytest.raises(AdapterSourceNotAllowed, match="--allowed-urls"):
            sources.check(source)
    sources.close()


def test_by_default_the_hub_alone_is_allowed(tmp_path: Path) -> None:
    sources = Sources(staging=tmp_path / "s", limits=SourceLimits(max_bytes=1 << 20))
    sources.check("hf://any/repo")
    for source in ("https://huggingface.co/any/repo", "s3://bucket/x"):
        with pytest.raises(AdapterSourceNotAllowed):
            sources.check(source)
    sources.close()


@pytest.mark.parametrize("prefix", ["https://", "http://*", "*", "s3://", "https://host/?x", "/local", "ftp://host"])
def test_a_prefix_that_is_no_url_is_said_at_the_start(prefix: str) -> None:
    with pytest.raises(AdapterSourceInvalid):
        AllowList([prefix])


@pytest.mark.parametrize("name", ["s3", "gs", "az"])
def test_without_obstore_the_extra_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.lifecycle.sources.sources.find_spec", lambda module: None)
    sources = Sources(allowed_urls=[f"{name}://bucket"], staging=tmp_path / "s", limits=SourceLimits(max_bytes=1))
    with pytest.raises(AdapterSourceUnsupported, match=r"pip install 'loramux\[cloud\]'"):
        sources.check(f"{name}://bucket/x")
    sources.close()


@pytest.mark.parametrize(
    "source",
    [
        "https://user:hunter2@host/x", "https://host/x?sig=hunter2", "s3://key:hunter2@bucket/x", "ftp://u:hunter2@h/x",
        "https://host/x#hunter2", "hf://hunter2:x@org/repo?y",
    ],
)  # fmt: skip
def test_what_may_be_a_secret_in_a_url_is_not_repeated(source: str) -> None:
    with pytest.raises(AdapterSourceInvalid) as caught:
        parse_source(source)
    assert "hunter2" not in str(caught.value)
    with pytest.raises(AdapterSourceInvalid):
        parse_url(source)


@pytest.mark.parametrize(
    "source",
    [
        "https://bob:hun/ter2@host/x", "https://bob:hunter2?a@host/x", "https://bob:#hunter2@host/x",
        "https://bob:a@hunter2@host/x", "https://bob:hunter2%40host/x", "https://bob:hunter2\uff20host/x",
        " https://bob:hunter2@host/x", "'https://bob:hunter2@host/x'", "\ufeffHTTPS://bob:hunter2@host/x",
        "https:/bob:hunter2@host/x", "https:\\\\bob:hunter2@host/x", "https:bob:hunter2@host/x",
        "https://bob:hunter2@host/x\0", "https://bob:hunter2@host/" + "x" * 5000, "https://bob:hunter2\ud800@host/x",
        "https://bob:a\nhunter2@host/x", "https://host/x?a\nhunter2", "s3://key:hun/ter2@bucket/x",
    ],
)  # fmt: skip
def test_no_spelling_of_a_password_is_repeated(source: str) -> None:
    with pytest.raises((AdapterSourceInvalid, AdapterNotFound)) as caught:
        parse_source(source)
    assert "ter2" not in str(caught.value)


_SECRET = st.text(st.characters(codec="utf-8") | st.sampled_from("@/:?#%\\ "), max_size=20).map("«{}»".format)


@given(
    before=st.sampled_from(["", " ", "\t", "'", "<"]),
    scheme=st.sampled_from(["http://", "https://", "HTTPS://", "https:/", "https:", "https:\\\\"]),
    user=st.text(st.sampled_from("bob@:/?#."), max_size=5),
    password=_SECRET,
    at=st.sampled_from(["@", "%40"]),
    place=st.text(st.sampled_from("host.x/@?#:"), max_size=12),
)
def test_no_password_of_a_web_url_is_repeated(
    before: str, scheme: str, user: str, password: str, at: str, place: str
) -> None:
    source = f"{before}{scheme}{user}:{password}{at}{place}"
    with pytest.raises((AdapterSourceInvalid, AdapterNotFound)) as caught:
        parse_source(source)
    for mark in "«»":
        assert mark not in str(caught.value) and f"\\x{ord(mark):x}" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "told"),
    {
        "hf://org/repo@main/sub": "hf://org/repo@main/sub",
        "s3://bucket/a@b": "s3://bucket/a@b",
        "https://host:80/x": "https://host:80/x",
        "https://bob:p/w@host/x?sig=1": "https://…@host/x?…",
        "/srv/a@b": "/srv/a@b",
    }.items(),
)
def test_what_is_no_secret_is_told(source: str, told: str) -> None:
    assert without_secrets(source) == told


def test_templates() -> None:
    template = SourceTemplate("hf://org/{name}")
    assert template.source_for("sql-lora.v2") == "hf://org/sql-lora.v2"
    assert template.source_for("repo/sub") == "hf://org/repo/sub"
    assert SourceTemplate("/srv/{name}/final").source_for("a") == "/srv/a/final"
    for name in (
        "", ".", "..", "../x", "a/../b", "a//b", "/a", "a/", "a@main", "base:a", "a b", "%2e%2e", "a%2fb", "a\\b",
        "a\0", "é",
        "-x", ".hidden", "a?b", "a#b", "{name}", "a..b", "a\n",
    ):  # fmt: skip
        assert template.source_for(name) is None, name
    for text in ("hf://org/x", "/srv/{name}/{name}", "", "{NAME}"):
        with pytest.raises(ValueError, match="exactly once"):
            SourceTemplate(text)
