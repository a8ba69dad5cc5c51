"""`loramux adapters …` over real HTTP: what is sent, what is shown on a terminal and elsewhere, what goes wrong."""

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from rich.console import Console

from server import adapter_progress
from server.adapter_client import AdapterClient, ServerSaidNo
from server.adapter_views import failure_of
from server.adapter_watch import AdapterRows, watch_adapters
from server.cli import run
from server.event_lines import read_events
from tests.server.fake_adapter_server import TOTAL, VERSION, FakeAdapterServer, description, serving

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def fake() -> FakeAdapterServer:
    return FakeAdapterServer()


@pytest.fixture
def url(fake: FakeAdapterServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(adapter_progress, "_POLL_SECONDS", 0.01)
    with serving(fake) as address:
        monkeypatch.setenv("LORAMUX_URL", address)
        yield address


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")


def _run(*arguments: str) -> int:
    return run(["adapters", *arguments])


# ls


def test_ls_is_plain_lines_without_a_terminal(url: str, fake: FakeAdapterServer, capsys: Capture) -> None:
    fake.adapters["sql"] = description("sql", pin=True, tier="device", state="active")
    fake.adapters["cold"] = description(
        "cold", state="registered", version=None, lora_rank=None, num_bytes=None, tier=None, leases=0, source="hf://a/b"
    )
    assert _run("ls") == 0
    header, *rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert header == ["name", "version", "rank", "size", "state", "tier", "in use", "pin", "source"]
    assert rows == [
        ["sql", "abababababab", "8", "2 KiB", "active", "device", "1", "pinned", "/a/sql"],
        ["cold", "-", "-", "-", "registered", "-", "0", "-", "hf://a/b"],
    ]


def test_ls_is_a_table_on_a_terminal(url: str, fake: FakeAdapterServer, terminal: None, capsys: Capture) -> None:
    assert _run("ls") == 0
    assert "no adapters are loaded" in capsys.readouterr().out
    fake.adapters["sql"] = description("sql", source="/a/[b]/\x1b]0;evil\x07")
    assert _run("ls") == 0
    out = capsys.readouterr().out
    assert "in use" in out
    assert "\t" not in out
    assert "/a/[b]/" in out  # no markup
    assert "\x1b]0;" not in out  # and nothing that steers the terminal


@pytest.mark.parametrize(
    ("state", "progress", "cell"),
    [
        ("validating", {"unit": "norms", "done": 50, "total": 224}, "validating 22%"),
        ("fetching", {"unit": "bytes", "done": 0, "total": 224}, "fetching"),
        ("fetching", {"unit": "bytes", "done": 7, "total": None}, "fetching"),
        ("ready", {"unit": "norms", "done": 224, "total": 224}, "ready, new 100%"),
        ("ready", None, "ready"),
        ("ready", {"done": "x", "total": -1}, "ready"),
    ],
)
def test_ls_shows_how_far_a_load_is(
    url: str, fake: FakeAdapterServer, capsys: Capture, state: str, progress: Any, cell: str
) -> None:
    fake.adapters["sql"] = description("sql", state=state, progress=progress)
    assert _run("ls") == 0
    assert capsys.readouterr().out.splitlines()[1].split("\t")[4] == cell


def test_ls_as_json_is_the_servers_answer(url: str, fake: FakeAdapterServer, capsys: Capture) -> None:
    fake.adapters["sql"] = description("sql")
    assert _run("ls", "--json") == 0
    assert json.loads(capsys.readouterr().out) == [description("sql")]


# load


def test_load_and_unload_send_what_was_typed(
    url: str, fake: FakeAdapterServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    monkeypatch.setenv("LORAMUX_ADMIN_API_KEY", "admin")
    monkeypatch.chdir(tmp_path)
    options = ["--load-inplace", "--pin", "--ttl", "60", "--priority", "-3"]
    assert _run("load", "org/sql:1", "folder", *options) == 0
    assert _run("load", "b", "hf://org/b@main") == 0
    assert _run("unload", "org/sql:1") == 0
    assert _run("unload", "b", "--mode", "abort", "--deadline", "0.5") == 0
    settings = {"pin": True, "ttl": 60.0, "priority": -3, "load_inplace": True}
    assert fake.received == [
        *[("POST", "/v1/adapters?wait=1.0", "Bearer admin", body)
          for body in ({"name": "org/sql:1", "source": str(tmp_path / "folder"), **settings},
                       {"name": "b", "source": "hf://org/b@main"})],
        ("DELETE", "/v1/adapters/org/sql%3A1", "Bearer admin", None),
        ("DELETE", "/v1/adapters/b?mode=abort&deadline=0.5", "Bearer admin", None),
    ]  # fmt: skip
    out = capsys.readouterr().out.splitlines()
    assert out[1].split("\t")[:2] == ["org/sql:1", "abababababab"]
    assert out[-1] == "b is unloaded; 2 KiB of host memory and 1 MiB of device memory freed"


def test_load_options_are_sent_with_a_load_and_with_an_upload(
    url: str, fake: FakeAdapterServer, tmp_path: Path, capsys: Capture
) -> None:
    options = ["--ignore", "*.inv_freq", "--ignore", "visual.*", "--moe-lora-b-layout", "grouped_by_expert"]
    assert _run("load", "sql", "hf://org/sql", *options) == 0
    assert _run("upload", "b", str(_folder(tmp_path / "a", b"x")), *options) == 0
    sent = {"ignore": ["*.inv_freq", "visual.*"], "moe_lora_b_layout": "grouped_by_expert"}
    assert fake.received[0][3] == {"name": "sql", "source": "hf://org/sql", **sent}
    assert parse_qs(urlsplit(fake.received[1][1]).query) == {
        "name": ["b"], "wait": ["1.0"], "ignore": sent["ignore"], "moe_lora_b_layout": ["grouped_by_expert"]
    }  # fmt: skip
    assert _run("load", "sql", "hf://org/sql", "--moe-lora-b-layout", "columns") == 2


def test_a_slow_load_is_waited_for(url: str, fake: FakeAdapterServer, capsys: Capture) -> None:
    fake.slow["sql"] = 4
    assert _run("load", "sql", "hf://org/sql") == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[1].split("\t")[4] == "ready"
    assert err == ""  # no bar where nobody looks
    assert [method for method, *_ in fake.received].count("GET") == 4


def test_a_slow_replacement_is_waited_for_while_the_old_one_serves(
    url: str, fake: FakeAdapterServer, capsys: Capture
) -> None:
    fake.adapters["sql"] = description("sql", source="/old")
    fake.slow["sql"] = 3
    assert _run("load", "sql", "/new", "--load-inplace") == 0
    assert capsys.readouterr().out.splitlines()[1].split("\t")[-1] == "/new"


def test_a_load_shows_its_progress_and_report_on_a_terminal(
    url: str, fake: FakeAdapterServer, terminal: None, capsys: Capture
) -> None:
    fake.slow["sql"] = 50
    assert _run("load", "sql", "hf://org/sql") == 0
    out, err = capsys.readouterr()
    assert "sql fetching" in err
    assert "1.0 MiB" in err or "/1.0" in err
    assert "2: q_proj x 2" in out
    assert "B is zero" in out


def test_a_load_shows_how_many_norms_are_done_on_a_terminal(
    url: str, fake: FakeAdapterServer, terminal: None, capsys: Capture
) -> None:
    fake.slow["sql"], fake.unit = 50, "norms"
    assert _run("load", "sql", "hf://org/sql") == 0
    err = capsys.readouterr().err
    assert f"/{TOTAL:,} norms" in err and "MB" not in err and "MiB" not in err and "bytes" not in err


def test_a_load_that_is_not_waited_for_says_so(url: str, fake: FakeAdapterServer, capsys: Capture) -> None:
    assert _run("load", "sql", "hf://org/sql", "--no-wait") == 0
    assert fake.received == [("POST", "/v1/adapters", None, {"name": "sql", "source": "hf://org/sql"})]
    row = capsys.readouterr().out.splitlines()[1].split("\t")
    assert (row[0], row[4], row[-1]) == ("sql", "fetching", "hf://org/sql")


@pytest.mark.parametrize("polls", [0, 3])
def test_a_load_that_fails_says_why_however_long_it_took(
    url: str, fake: FakeAdapterServer, capsys: Capture, polls: int
) -> None:
    fake.slow["sql"] = polls
    fake.broken["sql"] = ("adapter_corrupt", "the file is cut short")
    assert _run("load", "sql", "hf://org/sql") == 1
    err = capsys.readouterr().err
    assert "the file is cut short" in err
    assert len(err.splitlines()) == 1


def test_a_load_over_its_time_is_status_1(url: str, fake: FakeAdapterServer, capsys: Capture) -> None:
    fake.slow["sql"] = 10**9
    assert _run("load", "sql", "hf://org/sql", "--timeout", "0.3") == 1
    assert "sql is still fetching; see: loramux adapters describe sql" in capsys.readouterr().err
    assert fake.received[0][1] == "/v1/adapters?wait=0.3"


def test_a_load_whose_name_is_taken_away_meanwhile_is_status_1(
    url: str, fake: FakeAdapterServer, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    fake.slow["sql"] = 10**9
    monkeypatch.setattr(fake, "describe", lambda name: FakeAdapterServer().describe(name))
    assert _run("load", "sql", "hf://org/sql") == 1
    assert "no adapter is registered as 'sql' (404)" in capsys.readouterr().err


# upload


def _folder(path: Path, weights: bytes) -> Path:
    path.mkdir()
    (path / "adapter_config.json").write_text('{"r": 8}')
    (path / "adapter_model.safetensors").write_bytes(weights)
    return path


def test_upload_sends_both_files_byte_for_byte(
    url: str, fake: FakeAdapterServer, tmp_path: Path, capsys: Capture
) -> None:
    weights = bytes(range(256)) * 16 * 1024 + b"\r\n--"  # over several pieces
    folder = _folder(tmp_path / "a", weights)
    fake.slow["sql"] = 2
    assert _run("upload", "sql", str(folder), "--pin", "--ttl", "9") == 0
    method, path, _, body = fake.received[0]
    assert (method, path) == ("POST", "/v1/adapters/upload?name=sql&pin=true&ttl=9.0&wait=1.0")
    assert body == {"adapter_config.json": b'{"r": 8}', "adapter_model.safetensors": weights}
    assert capsys.readouterr().out.splitlines()[1].startswith("sql\tabababababab")


@pytest.mark.parametrize("index", ["adapter_model.safetensors.index.json", "model.safetensors.index.json"])
def test_upload_sends_all_that_a_load_reads(url: str, fake: FakeAdapterServer, tmp_path: Path, index: str) -> None:
    folder = _folder(tmp_path / "a", b"")
    (folder / "adapter_model.safetensors").unlink()
    read = {
        "adapter_config.json": b'{"r": 8}',
        index: b'{"weight_map": {"x": "b.safetensors", "y": "a-1.safetensors", "z": "b.safetensors"}}',
        "a-1.safetensors": b"one",
        "b.safetensors": b"two",
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b"{}",
        "chat_template.jinja": b"x",
    }
    unread = ("README.md", "optimizer.pt", "other.safetensors", "tokenizer.model", "special_tokens_map.json")
    for name, data in {**read, **dict.fromkeys(unread, b"?")}.items():
        (folder / name).write_bytes(data)
    assert _run("upload", "sql", str(folder)) == 0
    assert fake.received[0][3] == read


@pytest.mark.parametrize("shard", ['a"; x="y.safetensors', "a\r\nX: y.safetensors", " .safetensors", "ä.safetensors"])
def test_a_shard_whose_name_would_break_the_request_is_not_sent(
    url: str, fake: FakeAdapterServer, tmp_path: Path, shard: str, capsys: Capture
) -> None:
    folder = _folder(tmp_path / "a", b"")
    (folder / "adapter_model.safetensors").unlink()
    (folder / shard).write_bytes(b"x")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
    assert _run("upload", "sql", str(folder)) == 1
    assert "cannot be sent" in capsys.readouterr().err
    assert fake.received == []


def test_a_pickle_is_not_sent(url: str, fake: FakeAdapterServer, tmp_path: Path, capsys: Capture) -> None:
    folder = _folder(tmp_path / "a", b"")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert _run("upload", "sql", str(folder)) == 1
    assert "loramux convert" in capsys.readouterr().err.replace("\n", " ")
    assert fake.received == []


def test_upload_shows_a_bar_on_a_terminal(
    url: str, fake: FakeAdapterServer, tmp_path: Path, terminal: None, capsys: Capture
) -> None:
    assert _run("upload", "sql", str(_folder(tmp_path / "a", b"x" * 5_000_000))) == 0
    assert "sql sending" in capsys.readouterr().err


def test_an_upload_that_is_refused_half_way_says_why(
    url: str, fake: FakeAdapterServer, tmp_path: Path, capsys: Capture
) -> None:
    fake.quota = 1000
    assert _run("upload", "sql", str(_folder(tmp_path / "a", b"x" * 1_000_000))) == 1
    assert "over the quota of uploads (413)" in capsys.readouterr().err


def test_a_folder_without_weights_is_not_sent(
    url: str, fake: FakeAdapterServer, tmp_path: Path, capsys: Capture
) -> None:
    folder = _folder(tmp_path / "a", b"")
    (folder / "adapter_model.safetensors").unlink()
    assert _run("upload", "sql", str(folder)) == 1
    assert "no adapter_model.safetensors or adapter_model.safetensors.index.json in" in capsys.readouterr().err.replace(
        "\n", " "
    )
    assert fake.received == []


# unload, describe, pin, alias, rollback


def test_unload_says_when_requests_still_use_it(url: str, fake: FakeAdapterServer, capsys: Capture) -> None:
    fake.adapters["sql"] = description("sql")
    fake.draining.add("sql")
    assert _run("unload", "sql", "--mode", "drain") == 0
    assert "sql is draining: the name is gone" in capsys.readouterr().out


def test_unload_refuses_another_mode(url: str, capsys: Capture) -> None:
    assert _run("unload", "sql", "--mode", "kill") == 2
    assert _run("unload", "sql", "--deadline", "-1") == 2


def test_describe_shows_every_field_and_the_report(url: str, fake: FakeAdapterServer, capsys: Capture) -> None:
    failure = {"code": "adapter_corrupt", "why": "cut"}
    fake.adapters["sql"] = description("sql", failure=failure, priority=3, ttl=None, previous=["cd" * 32])
    assert _run("describe", "sql") == 0
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines() if " " in line}
    assert lines["version"] == VERSION
    assert lines["num_bytes"] == "2 KiB (2048)"
    assert lines["pin"] == "false"
    assert lines["priority"] == "3"
    assert lines["failure"] == "code adapter_corrupt, why cut"
    assert lines["previous"] == "cd" * 32
    assert lines["modules"] == "2: q_proj x 2"
    assert lines["warning"] == "B is zero"
    assert "ttl" not in lines
    assert _run("describe", "sql", "--json") == 0
    assert json.loads(capsys.readouterr().out)["previous"] == ["cd" * 32]


def test_pin_and_unpin(url: str, fake: FakeAdapterServer, capsys: Capture) -> None:
    fake.adapters["sql"] = description("sql")
    assert (_run("pin", "sql"), _run("unpin", "sql")) == (0, 0)
    assert [(method, body) for method, _, _, body in fake.received] == [
        ("PATCH", {"pin": True}),
        ("PATCH", {"pin": False}),
    ]
    assert capsys.readouterr().out == "sql is pinned\nsql is not pinned\n"
    assert _run("pin", "none") == 1


def test_alias_is_made_shown_and_removed(url: str, fake: FakeAdapterServer, capsys: Capture) -> None:
    assert _run("alias", "default", "sql=90", "sql@1234abcd=10.5") == 0
    assert fake.received[0][:2] == ("PUT", "/v1/aliases/default")
    assert fake.received[0][3] == {
        "targets": [{"adapter": "sql", "weight": 90.0}, {"adapter": "sql@1234abcd", "weight": 10.5}]
    }
    shown = capsys.readouterr().out
    assert shown.splitlines() == ["alias\tadapter\tweight", "default\tsql\t90", "default\tsql@1234abcd\t10.5"]
    assert (_run("alias", "default"), _run("alias")) == (0, 0)
    assert capsys.readouterr().out == shown * 2
    assert _run("alias", "default", "sql") == 0
    assert fake.aliases["default"] == [{"adapter": "sql", "weight": 1.0}]
    assert _run("alias", "default", "--remove") == 0
    assert fake.aliases == {}
    assert _run("alias", "default") == 1


@pytest.mark.parametrize("target", ["sql=", "=1", "sql=x", "sql=nan", "sql=-1", "sql=1e400", "sql=inf"])
def test_a_target_without_a_weight_is_refused(url: str, fake: FakeAdapterServer, capsys: Capture, target: str) -> None:
    assert _run("alias", "default", target) == 1
    assert f"'{target}' is no target; write ADAPTER=WEIGHT" in capsys.readouterr().err
    assert fake.received == []


def test_rollback_is_of_an_adapter_or_else_of_an_alias(url: str, fake: FakeAdapterServer, capsys: Capture) -> None:
    fake.adapters["sql"] = description("sql")
    fake.aliases["default"] = [{"adapter": "sql", "weight": 1}]
    assert (_run("rollback", "sql"), _run("rollback", "default")) == (0, 0)
    assert [path for _, path, *_ in fake.received] == [
        "/v1/adapters/sql/rollback",
        "/v1/adapters/default/rollback",
        "/v1/aliases/default/rollback",
    ]
    assert "default\tsql\t1" in capsys.readouterr().out
    assert _run("rollback", "none") == 1
    assert "no adapter is registered as 'none' (404)" in capsys.readouterr().err


# watch


def _watch(url: str, turns: int, *, name: str | None = None, console: Console | None = None) -> None:
    """Watch until the stream was lost for the `turns`-th time."""
    left = [turns]

    def sleep(_: float) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watch_adapters(AdapterClient(url), name, console or Console(), sleep=sleep)


def test_watch_is_a_line_per_change_without_a_terminal(url: str, fake: FakeAdapterServer, capsys: Capture) -> None:
    failed = description("sql", state="failed", failure=["adapter_corrupt", "cut short"])
    fake.streams = [[description("sql"), description("b"), failed]]
    _watch(url, 1)
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [line.split("\t")[0] for line in lines] == ["name", "sql", "b", "sql"]
    assert lines[-1].split("\t")[-1] == "adapter_corrupt: cut short"
    assert "the server ended the stream" in err
    assert fake.received[0][1] == "/v1/adapters?watch=true"


def test_watch_of_one_name_shows_no_other(url: str, fake: FakeAdapterServer, capsys: Capture) -> None:
    fake.streams = [[description("sql"), description("b")]]
    _watch(url, 1, name="b")
    assert [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()] == ["name", "b"]


def test_watch_goes_on_after_a_lost_stream_and_tells_it_once(
    url: str, fake: FakeAdapterServer, capsys: Capture
) -> None:
    fake.streams = [[description("sql")], [description("b")]]
    _watch(url, 4)
    out, err = capsys.readouterr()
    assert [line.split("\t")[0] for line in out.splitlines()] == ["name", "sql", "b"]
    assert err.count("the server ended the stream") == 2
    assert err.count("no stream is left (503)") == 1


def test_watch_of_no_server_is_an_error(url: str, fake: FakeAdapterServer) -> None:
    with pytest.raises(ServerSaidNo, match="no stream is left"):
        watch_adapters(AdapterClient(url), None, Console())
    assert _run("watch") == 1


def test_watch_is_a_live_table_on_a_terminal(
    url: str, fake: FakeAdapterServer, terminal: None, capsys: Capture
) -> None:
    fake.streams = [[description("sql", state="fetching"), description("sql", state="active")]]
    _watch(url, 1)
    out = capsys.readouterr().out
    assert "fetching" in out and "active" in out
    assert out.index("fetching") < out.index("active")
    assert "the server ended the stream; trying again" in out


def test_watch_ends_well_when_interrupted(url: str, fake: FakeAdapterServer) -> None:
    fake.streams, fake.holds_streams = [[description("sql")]], True
    command = [sys.executable, "-m", "server", "adapters", "watch", "--url", url]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, and inherited so, in the background
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        assert process.stdout is not None
        assert [process.stdout.readline().split("\t")[0] for _ in range(2)] == ["name", "sql"]
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")


def test_rows_follow_an_adapters_life() -> None:
    rows = AdapterRows()

    def states() -> list[tuple[str, str, str]]:
        return [(row["name"], row["version"], row["state"]) for row in rows]

    rows.take(description("sql", version="1", state="ready"))
    rows.take(description("a", version="3", state="ready"))
    rows.take(description("sql", version="2", state="active"))  # replaced
    rows.take(description("sql", version="1", state="draining"))  # while requests hold the old one
    assert states() == [("a", "3", "ready"), ("sql", "2", "active"), ("sql", "1", "draining")]
    rows.take(description("sql", version="1", state="unloaded"))
    assert states() == [("a", "3", "ready"), ("sql", "2", "active")]
    rows.take(description("sql", version="2", state="draining"))  # the name is gone
    assert states() == [("a", "3", "ready"), ("sql", "2", "draining")]
    rows.take({"name": "sql", "version": "2", "state": "unloaded"})
    rows.take({"name": "a", "state": "unloaded"})
    assert states() == []


# What goes wrong, and what the pieces do by themselves.


def test_errors_of_the_server_are_one_line(url: str, capsys: Capture) -> None:
    assert _run("ls", "--admin-api-key", "wrong") == 1
    err = capsys.readouterr().err
    assert "not one of this server's keys (401); set --admin-api-key" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("command", [["ls"], ["pin", "a"], ["watch"], ["load", "a", "/a"], ["alias"]])
def test_no_server_names_the_way_out(command: list[str], capsys: Capture) -> None:
    assert _run(*command, "--url", "http://127.0.0.1:1") == 1
    assert "no server answers at http://127.0.0.1:1" in capsys.readouterr().err


def test_no_server_for_an_upload_names_the_way_out(tmp_path: Path, capsys: Capture) -> None:
    folder = _folder(tmp_path / "a", b"x")
    assert _run("upload", "a", str(folder), "--url", "http://127.0.0.1:1") == 1
    assert "no server answers at http://127.0.0.1:1" in capsys.readouterr().err
    assert _run("upload", "a", str(folder), "--url", "127.0.0.1:1") == 1
    assert "is not an address; write http://host:port" in capsys.readouterr().err


def test_events_are_read_as_the_standard_has_them() -> None:
    stream = b": hi\n\nevent: adapter\ndata: 1\ndata:2\nid: 7\n\ndata: x\r\n\r\nevent: none\n\nevent: a\ndata: cut off"
    assert list(read_events(stream.splitlines(keepends=True))) == [("adapter", "1\n2"), ("message", "x")]


@pytest.mark.parametrize(
    ("failure", "text"),
    [
        (None, None),
        ({"code": "a", "why": "b"}, "a: b"),
        (["a", "b"], "a: b"),
        ("odd", "odd"),
    ],
)
def test_a_failure_is_told_in_whatever_form_it_comes(failure: object, text: str | None) -> None:
    assert failure_of({"failure": failure}) == text


def test_the_commands_start_without_torch() -> None:
    code = "import sys, server.cli, server.cli_adapters; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_file_that_cannot_be_sent_is_named(url: str, tmp_path: Path, capsys: Capture) -> None:
    folder = _folder(tmp_path / "a", b"x")
    weights = folder / "adapter_model.safetensors"
    weights.unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "adapter_model-1.safetensors"}}')
    assert _run("upload", "a", str(folder)) == 1
    assert "adapter_model-1.safetensors cannot be read: No such file" in " ".join(capsys.readouterr().err.split())


def test_a_server_that_takes_long_is_not_said_to_be_away() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = AdapterClient(f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(ServerSaidNo, match="did not answer in time"):
            client._call("GET", "/v1/adapters", timeout=0.05)
