"""The text of an adapters file: what is read, and that every mistake is told by line and reason."""

import time
from pathlib import Path

import pytest

from adapters.adapter_ref import AdapterVersion
from server.lifecycle.adapters_yaml import MAX_FILE_BYTES, AdaptersFileInvalid, parse_adapters_file
from server.lifecycle.alias_target import parse_target
from server.lifecycle.catalogue_records import AliasTarget
from server.lifecycle.control import WantedAdapter

_FOLDER = Path("/etc/loramux")


def _parse(text: str) -> tuple[dict[str, WantedAdapter], dict[str, tuple[AliasTarget, ...]]]:
    wanted = parse_adapters_file(text.encode(), _FOLDER)
    return dict(wanted.adapters), dict(wanted.aliases)


def _target(adapter: str, version: str | None, weight: float) -> AliasTarget:
    return AliasTarget(adapter=adapter, version=None if version is None else AdapterVersion(version), weight=weight)


def test_everything_a_file_may_say() -> None:
    adapters, aliases = _parse(
        """
        # comment
        adapters:
          - name: sql
            source: hf://org/sql@main/sub
            pin: true
            ttl: 3600
            priority: -2
          - {name: "org/b:1@main", source: ../b, ttl: null}
          - {name: c, source: /a/c, ttl: 0.5}
        aliases:
          default:
            - {adapter: sql, weight: 90}
            - {adapter: sql@1234abcd, weight: 10.5}
          other: [{adapter: "org/b:1@main"}]
        """
    )
    assert adapters == {
        "sql": WantedAdapter(
            name="sql", source="hf://org/sql@main/sub", pin=True, ttl=3600.0, priority=-2, managed_by="file"
        ),
        "org/b:1@main": WantedAdapter(name="org/b:1@main", source="/etc/b", managed_by="file"),
        "c": WantedAdapter(name="c", source="/a/c", ttl=0.5, managed_by="file"),
    }
    assert aliases == {
        "default": (_target("sql", None, 90.0), _target("sql", "1234abcd", 10.5)),
        "other": (_target("org/b:1@main", None, 1.0),),
    }


@pytest.mark.parametrize("text", ["adapters: []", "{}", "aliases: {}", "adapters: []\naliases: {}", "---\n{}\n..."])
def test_nothing_can_be_asked_for_in_words(text: str) -> None:
    assert _parse(text) == ({}, {})


@pytest.mark.parametrize("source", ["upload:abc", "s3://b/p", "file:///a", "https://h/p", "/abs"])
def test_sources_of_their_own_place_stay(source: str) -> None:
    assert _parse(f"adapters: [{{name: a, source: '{source}'}}]")[0]["a"].source == source


_A = "adapters:\n  - {name: a, source: /a}\n"

_MISTAKES = [
    ("", "it is empty"),
    ("# only a comment\n", "it is empty"),
    ("~", "it is empty"),
    ("- a", "line 1: the file must be keys with values, not a list"),
    ("word", "line 1: the file must be keys with values, not 'word'"),
    ("adaptors: []", "line 1: 'adaptors' is no key of the file; known are adapters, aliases"),
    ("adapters: {a: b}", "line 1: adapters must be a list"),
    ("adapters:", "line 1: adapters must be a list, not nothing"),
    ("adapters: [a]", "line 1: an adapter must be keys with values, not 'a'"),
    (_A + "  - {name: b}", "line 3: an adapter needs the key 'source'"),
    (_A + "  - {source: /b}", "line 3: an adapter needs the key 'name'"),
    (_A + "  - {name: a, source: /b}", "line 3: the adapter 'a' stands in line 2 already"),
    (_A + "  - name: b\n    source: /b\n    sorce: /c", "line 5: 'sorce' is no key of an adapter; known are name, s"),
    (_A + "  - name: b\n    source: /b\n    name: c", "line 5: the key 'name' stands in line 3 already"),
    (_A + "adapters: []", "line 3: the key 'adapters' stands in line 1 already"),
    ("adapters: [{name: no, source: /a}]", "line 1: a name must be text, not 'no'; put it in quotes"),
    ("adapters: [{name: 7, source: /a}]", "line 1: a name must be text, not '7'"),
    ("adapters: [{name: [a], source: /a}]", "line 1: a name must be text, not a list"),
    ("adapters: [{name: ../a, source: /a}]", "line 1: '../a' cannot be an adapter's name"),
    ("adapters: [{name: '', source: /a}]", "line 1: '' cannot be an adapter's name"),
    ("adapters: [{name: a, source: ''}]", "line 1: a source is 1 to"),
    ('adapters: [{name: a, source: "/a\\0b"}]', "line 1: a source is 1 to"),
    (f"adapters: [{{name: a, source: {'x' * 5000}}}]", "line 1: a source is 1 to"),
    ("adapters: [{name: a, source: /a, pin: 1}]", "line 1: pin must be true or false, not '1'"),
    ("adapters: [{name: a, source: /a, pin: yes}]", "line 1: pin must be true or false, not 'yes'"),
    ("adapters: [{name: a, source: /a, pin: 'true'}]", "line 1: pin must be true or false"),
    ("adapters: [{name: a, source: /a, ttl: 0}]", "line 1: ttl must be a number over zero"),
    ("adapters: [{name: a, source: /a, ttl: -1}]", "line 1: ttl must be a number over zero"),
    ("adapters: [{name: a, source: /a, ttl: .inf}]", "line 1: ttl must be a number over zero"),
    ("adapters: [{name: a, source: /a, ttl: .nan}]", "line 1: ttl must be a number over zero"),
    ("adapters: [{name: a, source: /a, ttl: 1e999}]", "line 1: ttl must be a number over zero"),
    ("adapters: [{name: a, source: /a, ttl: 1:30}]", "line 1: ttl must be a number over zero, not '1:30'"),
    ("adapters: [{name: a, source: /a, ttl: 1.2.3}]", "line 1: ttl must be a number over zero"),
    ("adapters: [{name: a, source: /a, priority: 1.5}]", "line 1: priority must be a whole number"),
    ("adapters: [{name: a, source: /a, priority: 0x10}]", "line 1: priority must be a whole number"),
    ("adapters: [{name: a, source: /a, priority: 99999999999}]", "line 1: priority must be a whole number"),
    ("aliases: []", "line 1: aliases must be keys with values, not a list"),
    ("aliases: {d: a}", "line 1: the alias 'd' must be a list, not 'a'"),
    ("aliases: {d: []}", "line 1: the alias 'd' needs a target with a weight over zero"),
    ("aliases: {d: [{adapter: a, weight: 0}]}", "line 1: the alias 'd' needs a target with a weight over zero"),
    ("aliases: {d: [{adapter: a, weight: -1}]}", "line 1: weight must be a number from zero"),
    ("aliases: {d: [{weight: 1}]}", "line 1: an alias's target needs the key 'adapter'"),
    ("aliases: {d: [{adapter: 'a b'}]}", "line 1: 'a b' cannot be an adapter's name"),
    ("aliases:\n  d: [{adapter: a}]\n  d: [{adapter: b}]", "line 3: the key 'd' stands in line 2 already"),
    (_A + "aliases:\n  a: [{adapter: b}]", "line 4: 'a' is an adapter's name (line 2) and cannot be an alias too"),
    ("adapters: &x []\naliases: *x", "line 1: anchors and aliases"),
    ("a: &x {}\nb: *x", "line 1: anchors and aliases"),
    ("b: *x", "line 1: anchors and aliases"),
    ("<<: {adapters: []}", "line 1: a key of the file must be text, not '<<'"),
    ("!!python/object/apply:os.system [ls]", "line 1: tags (!) are not read"),
    ("adapters: !!str x", "line 1: tags (!) are not read"),
    ("{}\n---\n{}", "line 2"),
    ("adapters: [", "line "),
    ("adapters: ]", "line 1"),
    ("\tadapters: []", "line 1"),
    ("a: 'x", "line "),
    ("adapters: [{name: a, source: '\x01'}]", "line 1: the character '\\x01' is not allowed"),
    ("adapters: []\n# \x7f", "line 2: the character"),
    ("[" * 20, "nested deeper than 8"),
    ("[" * 100_000, "nested deeper than 8"),
    ("? " * 100_000, "nested deeper than 8"),
    ("- " * 100_000, "nested deeper than 8"),
]


@pytest.mark.parametrize(("text", "why"), _MISTAKES, ids=range(len(_MISTAKES)))
def test_a_mistake_is_told_with_its_line(text: str, why: str) -> None:
    with pytest.raises(AdaptersFileInvalid) as caught:
        _parse(text)
    assert why in str(caught.value)
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()


def test_bytes_that_are_no_text() -> None:
    with pytest.raises(AdaptersFileInvalid, match="line 2: it is not UTF-8"):
        parse_adapters_file(b"adapters: []\n# \xff", _FOLDER)


def test_a_file_over_the_limit_is_not_read() -> None:
    with pytest.raises(AdaptersFileInvalid, match=f"over {MAX_FILE_BYTES} bytes"):
        parse_adapters_file(b"#" * (MAX_FILE_BYTES + 1), _FOLDER)


def test_a_bomb_of_anchors_takes_no_time() -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 64))
    began = time.monotonic()
    with pytest.raises(AdaptersFileInvalid, match="anchors"):
        _parse(bomb)
    assert time.monotonic() - began < 30


def test_thousands_of_adapters() -> None:
    text = "adapters:\n" + "".join(f"  - {{name: a{n}, source: /models/a{n}, pin: false}}\n" for n in range(5000))
    assert len(_parse(text)[0]) == 5000


@pytest.mark.parametrize(
    ("text", "adapter", "version"),
    [
        ("sql", "sql", None),
        ("sql@1234abcd", "sql", "1234abcd"),
        ("sql@" + "a" * 64, "sql", "a" * 64),
        ("sql@" + "a" * 65, "sql@" + "a" * 65, None),
        ("sql@1234abc", "sql@1234abc", None),
        ("sql@1234ABCD", "sql@1234ABCD", None),
        ("org/sql@main", "org/sql@main", None),
        ("org/sql@main@1234abcd", "org/sql@main", "1234abcd"),
    ],
)
def test_targets_may_name_a_version(text: str, adapter: str, version: str | None) -> None:
    assert parse_target(text, 2.0) == _target(adapter, version, 2.0)
