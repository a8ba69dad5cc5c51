"""Load options in a source's text: one spelling, nothing lost, folders with `#` in their names left alone; and that
they are kept wherever a source is, over restarts too."""

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.errors import AdapterError, AdapterNotFound, AdapterOptionInvalid, AdapterRefused
from adapters.read_options import EXPERT_B_LAYOUTS, MAX_PATTERNS, ReadOptions
from server.config import AdapterConfig
from server.lifecycle.adapters_file import AdaptersFile
from server.lifecycle.adapters_yaml import AdaptersFileInvalid, parse_adapters_file
from server.lifecycle.assembly import allowed_roots
from server.lifecycle.catalogue_rows import _report_of
from server.lifecycle.path_watch import WatchPace
from server.lifecycle.pending_load import parse_pending, pending_text
from server.lifecycle.sources.source_options import MAX_OPTION_CHARS, split_options, with_options
from server.lifecycle.unused_uploads import sweep_once
from server.serve import load_adapters
from tests.adapters.hostile import WEIGHTS, draft
from tests.server.fakes import TINY_BASE
from tests.server.lifecycle.fake_control import running
from tests.server.lifecycle.service_world import ServiceWorld, adapter, service_world, until

Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
EXTRA = "base_model.model.model.rotary_emb.inv_freq"
IGNORING = ReadOptions(ignore=("*.inv_freq",))
patterns = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), min_size=1, max_size=20)
some_options = st.builds(
    ReadOptions,
    ignore=st.lists(patterns, max_size=4).map(tuple),
    moe_lora_b_layout=st.none() | st.sampled_from(EXPERT_B_LAYOUTS),
)


@given(st.sampled_from(["hf://org/sql@main/sub", "/a/b", "/a/c#1", "upload:" + "0" * 64, "https://h/a"]), some_options)
def test_what_is_put_in_comes_out(source: str, options: ReadOptions) -> None:
    text = with_options(source, options)
    assert split_options(text) == (source, options)
    assert with_options(text) == text
    assert text.count("#") == source.count("#") + bool(options)


def test_one_spelling_for_one_meaning() -> None:
    spelled = "hf://o/r#ignore=visual.*&ignore=*.inv_freq&moe_lora_b_layout=rank_major"
    assert with_options(
        "hf://o/r#moe_lora_b_layout=rank_major&ignore=*%2Einv_freq&ignore=visual.*&ignore=visual.*"
    ) == (with_options(spelled))
    assert with_options(spelled) == "hf://o/r#ignore=*.inv_freq&ignore=visual.*&moe_lora_b_layout=rank_major"
    assert with_options("/a#ignore=a%23%26%2F%25") == "/a#ignore=a%23%26%2F%25"


@pytest.mark.parametrize(
    "source", ["/a#b", "/a#ignore=x/b", "/a#ignored=x", "/a#ignore", "/a#", "hf://o/r#main", "/a#ignore=x&b=c", "/a b"]
)
def test_what_is_not_of_their_form_belongs_to_the_source(source: str) -> None:
    assert split_options(source) == (source, ReadOptions())


@pytest.mark.parametrize(
    "source",
    [
        "/a#ignore=",
        "/a#moe_lora_b_layout=rank",
        "/a#moe_lora_b_layout=rank_major&moe_lora_b_layout=rank_major",
        "/a#ignore=%ff",
        "/a#ignore=%0A",
        "/a#" + "&".join(["ignore=a"] * (MAX_PATTERNS + 1)),
        "/a#ignore=" + "a" * 300,
        "/a#ignore=" + "%41" * MAX_OPTION_CHARS,
    ],
)
def test_bad_options_are_told(source: str) -> None:
    with pytest.raises(AdapterOptionInvalid):
        split_options(source)


def test_options_stand_in_one_place_and_have_a_bound() -> None:
    with pytest.raises(AdapterOptionInvalid, match="one of the two places"):
        with_options("/a#ignore=x", IGNORING)
    with pytest.raises(AdapterOptionInvalid, match="4096"):
        with_options("/a", ReadOptions(ignore=tuple("é" * 200 + str(i) for i in range(10))))


def test_an_adapters_file_gives_them_as_keys_or_in_the_source() -> None:
    text = """
    adapters:
      - {name: a, source: b, ignore: [visual.*, "*.inv_freq"], moe_lora_b_layout: rank_major}
      - {name: c, source: "hf://o/r#ignore=visual.*"}
    """
    wanted = parse_adapters_file(text.encode(), Path("/etc")).adapters
    assert wanted["a"].source == "/etc/b#ignore=*.inv_freq&ignore=visual.*&moe_lora_b_layout=rank_major"
    assert wanted["c"].source == "hf://o/r#ignore=visual.*"


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ("source: a, ignore: x", "must be a list"),
        ("source: a, ignore: [1]", "must be text"),
        ("source: a, ignore: ['']", "1 to 256"),
        ("source: a, moe_lora_b_layout: rank", "rank_major"),
        ("source: 'a#ignore=b', ignore: [c]", "one of the two places"),
        ("source: 'a#moe_lora_b_layout=b'", "rank_major"),
    ],
)
def test_mistakes_of_an_adapters_file_are_told_by_line(entry: str, why: str) -> None:
    with pytest.raises(AdaptersFileInvalid, match=f"line 2: .*{why}"):
        parse_adapters_file(f"adapters:\n  - {{name: a, {entry}}}".encode(), Path("/etc"))


def test_a_folder_of_the_command_line_is_allowed_without_them() -> None:
    config = AdapterConfig(allowed_roots=(Path("/r"),))
    assert allowed_roots(config, [Path("/m/a#ignore=x")]) == (Path("/r"), Path("/m/a"))


# In a server.


def with_more(folder: Path, seed: int = 0) -> str:
    """An adapter whose file also holds a buffer."""
    drawn = draft(folder, TINY_BASE, seed=seed)
    drawn.tensors[EXTRA] = np.ones(4, dtype=np.float32)
    drawn.write()
    return str(folder)


def ignored(world: ServiceWorld, name: str) -> object:
    described = world.service.view.describe(name).to_dict()
    return described["report"]["ignored"]


@pytest.mark.asyncio
async def test_they_are_kept_over_a_restart_and_where_weights_are_read_again(tmp_path: Path) -> None:
    source = with_more(tmp_path / "a")
    text = with_options(source, IGNORING)
    async with service_world(tmp_path / "state") as world:
        with pytest.raises(AdapterRefused):
            await world.load("plain", source)
        ref = await world.load("sql", text)
        assert (world.record("sql").source, ignored(world, "sql")) == (text, {EXTRA: 16})
        assert await world.load("same", text) == ref or world.record("same").version == ref.version
    async with service_world(tmp_path / "state") as world:
        assert world.record("sql").source == text and ignored(world, "sql") == {EXTRA: 16}
        world.store.remove(ref.version)  # the disk lost it: it is read from where it came, in the same way
        num_reads = world.reader.num_reads
        assert await world.use("sql") == ref.version and world.reader.num_reads == num_reads + 1


@pytest.mark.asyncio
async def test_the_same_files_with_other_options_are_another_version(tmp_path: Path) -> None:
    source, first = adapter(tmp_path / "a"), ReadOptions(ignore=("*.layers.0.self_attn.q_proj.*",))
    second = ReadOptions(ignore=("*.layers.1.*",))
    async with service_world(tmp_path / "state") as world:
        texts = {"whole": source, "one": with_options(source, first), "two": with_options(source, second)}
        versions = {name: (await world.load(name, text)).version for name, text in texts.items()}
        assert len(set(versions.values())) == 3 and set(versions.values()) == world.on_disk()
        stored = {name: sorted(world.store.read(version).modules) for name, version in versions.items()}
        assert (len(stored["whole"]), len(stored["one"])) == (3, 2) and stored["one"] != stored["two"]
        with pytest.raises(AdapterError, match="other weights"):
            await world.load("whole", texts["one"])
        assert (await world.load("whole", texts["one"], load_inplace=True)).version == versions["one"]
        await world.service.changes.rollback("whole")
        assert (world.record("whole").version, world.record("whole").source) == (versions["whole"], source)


@pytest.mark.asyncio
async def test_a_load_under_way_goes_on_with_them(tmp_path: Path) -> None:
    text = with_options(with_more(tmp_path / "a"), IGNORING)
    async with service_world(tmp_path / "state", server_id="s") as world:
        world.reader.gate.clear()
        job = await world.service.submit(world.service.changes.asked("sql", text))
        assert parse_pending(world.record("sql").pending or "").source == text
        assert parse_pending(pending_text(job.wanted, "s")) == job.wanted
        closing = asyncio.create_task(world.service.loader.close())
        await asyncio.sleep(0.05)
        world.reader.gate.set()
        await closing
        assert world.record("sql").version is None
    async with service_world(tmp_path / "state", server_id="s") as world:
        await until(lambda: world.record("sql").version is not None)
        assert ignored(world, "sql") == {EXTRA: 16} and world.record("sql").source == text


@pytest.mark.asyncio
async def test_a_file_with_them_is_followed_and_read_again_only_when_they_change(tmp_path: Path) -> None:
    with_more(tmp_path / "a")
    file = tmp_path / "adapters.yaml"
    entry = "adapters:\n  - {{name: sql, source: a, ignore: ['{}']}}\n"
    file.write_text(entry.format("*.inv_freq"))
    async with service_world(tmp_path / "state") as world:
        pace = WatchPace(rescan=0.2, quiet=0.05)
        async with running(AdaptersFile(file, world.service, pace=pace)):
            await until(lambda: "sql" in world.service.directory.records and world.record("sql").version is not None)
        assert ignored(world, "sql") == {EXTRA: 16}
        num_reads = world.reader.num_reads
        async with running(AdaptersFile(file, world.service, pace=pace)):
            await asyncio.sleep(0.5)
            assert world.reader.num_reads == num_reads, "what stands as the file has it was read again"
            file.write_text(entry.format("*.rotary_emb.*"))
            await until(lambda: world.record("sql").source == f"{tmp_path / 'a'}#ignore=*.rotary_emb.*")


@pytest.mark.asyncio
async def test_an_upload_that_is_loaded_with_them_is_in_use(tmp_path: Path) -> None:
    folder = Path(with_more(tmp_path / "a"))
    async with service_world(tmp_path / "state") as world:
        parts = [(name, (folder / name).read_bytes()) for name in ("adapter_config.json", WEIGHTS)]
        body = b"".join(
            b'--x\r\nContent-Disposition: form-data; name="f"; filename="%s"\r\n\r\n%s\r\n' % (name.encode(), data)
            for name, data in parts
        )

        async def chunks():  # type: ignore[no-untyped-def]
            yield body + b"--x--\r\n"

        upload = await world.uploads.receive("multipart/form-data; boundary=x", chunks())
        await world.load("sql", with_options(upload.source, IGNORING))
        unused = await sweep_once(world.uploads, world.service.directory.sources, frozenset())
        await sweep_once(world.uploads, world.service.directory.sources, unused)
        assert world.uploads.ids() == {upload.upload_id}


@pytest.mark.asyncio
async def test_the_command_line_may_name_them(tmp_path: Path) -> None:
    folder = with_more(tmp_path / "a")
    async with service_world(tmp_path / "state") as world:
        await load_adapters(world.service, [("sql", Path(f"{folder}#ignore=*.inv_freq"))])
        assert ignored(world, "sql") == {EXTRA: 16}


@pytest.mark.asyncio
async def test_a_folder_with_a_number_sign_is_a_folder(tmp_path: Path) -> None:
    async with service_world(tmp_path / "state") as world:
        await world.load("sql", adapter(tmp_path / "a#1"))
        with pytest.raises(AdapterNotFound):
            await world.load("no", f"{tmp_path}/a#1#ignored=x")


def test_records_of_before_have_a_list_that_is_empty() -> None:
    values = json.loads(
        '{"modules": {}, "num_params": 0, "num_bytes": 0, "lora_rank": 1, "features": [], "delta_norms": {},'
        '"warnings": [], "base_model": null, "stored_dtypes": [], "ignored": []}'
    )
    assert _report_of(values).ignored == {} and _report_of(values | {"ignored": {"a": 1}}).ignored == {"a": 1}
