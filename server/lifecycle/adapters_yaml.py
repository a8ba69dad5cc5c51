"""The text of an `--adapters-file` → what it asks for, or the line at fault and why. Pure: opens nothing.

    adapters:
      - {name: sql, source: hf://org/sql, pin: true, ttl: 3600, priority: 1}   # name and source are required
      - {name: tone, source: tone, ignore: [visual.*], moe_lora_b_layout: rank_major}
    aliases:
      default: [{adapter: sql, weight: 90}, {adapter: sql@1234abcd, weight: 10}]

Stricter than YAML: a key that stands twice, a key nobody knows, anchors and aliases (&, *), a tag, a value of another
type than is due (`name: no` is a truth value in YAML) are refused, because each is a mistake or an attack.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import yaml

from adapters.errors import AdapterNameInvalid, AdapterOptionInvalid
from adapters.read_options import ReadOptions
from adapters.registry import check_adapter_name
from adapters.untrusted_json import shown
from server.lifecycle.alias_target import parse_target
from server.lifecycle.catalogue_records import AliasTarget
from server.lifecycle.control import FILE_OWNER, WantedAdapter
from server.lifecycle.sources.source_options import with_options

MAX_FILE_BYTES = 4 * 1024**2
_MAX_DEPTH = 8
_MAX_SOURCE_CHARS = 4096
_TAG = "tag:yaml.org,2002:"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|upload:")
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C one is ten times as fast where it is installed


class AdaptersFileInvalid(Exception):
    """The message names the line and why."""


@dataclass(frozen=True, slots=True)
class WantedFile:
    """Everything that the file asks for, by name."""

    adapters: Mapping[str, WantedAdapter]
    aliases: Mapping[str, tuple[AliasTarget, ...]]


def parse_adapters_file(data: bytes, folder: Path) -> WantedFile:
    """`folder` is where sources without a scheme begin. Raises AdaptersFileInvalid."""
    fields = _fields(_document(data), "the file", optional=("adapters", "aliases"))
    adapters: dict[str, WantedAdapter] = {}
    lines: dict[str, int] = {}
    for node in _items(fields.get("adapters"), "adapters"):
        wanted = _adapter(node, folder)
        if wanted.name in adapters:
            _refuse(node, f"the adapter {wanted.name!r} stands in line {lines[wanted.name]} already")
        adapters[wanted.name], lines[wanted.name] = wanted, _line(node)
    return WantedFile(adapters, _aliases(fields.get("aliases"), lines))


# Text to nodes.


def _document(data: bytes) -> yaml.Node:
    if len(data) > MAX_FILE_BYTES:
        raise AdaptersFileInvalid(f"it is over {MAX_FILE_BYTES} bytes long")
    try:
        text = data.decode("utf-8-sig")
        if (found := _UNPRINTABLE.search(text)) is not None:
            line = text.count("\n", 0, found.start()) + 1
            raise AdaptersFileInvalid(f"line {line}: the character {ascii(found[0])} is not allowed")
        _refuse_risky_events(text)
        node = yaml.compose(text, Loader=_LOADER)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise AdaptersFileInvalid(f"line {line}: it is not UTF-8") from None
    except yaml.YAMLError as error:
        raise AdaptersFileInvalid(_told(error)) from None
    if node is None or (isinstance(node, yaml.ScalarNode) and _is(node, "null")):
        # More likely a file cut short while it is written than the wish to unload everything.
        raise AdaptersFileInvalid("it is empty; write `adapters: []` to have none")
    return node


def _refuse_risky_events(text: str) -> None:
    """Before a tree is built: what would grow it past the text, or nest it past the stack."""
    depth = 0
    for event in yaml.parse(text, Loader=_LOADER):
        line = event.start_mark.line + 1 if event.start_mark is not None else 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise AdaptersFileInvalid(f"line {line}: anchors and aliases (&, *) are not read; write it out")
        if getattr(event, "tag", None):
            raise AdaptersFileInvalid(f"line {line}: tags (!) are not read")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise AdaptersFileInvalid(f"line {line}: it is nested deeper than {_MAX_DEPTH} levels")


def _told(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    what = shown(getattr(error, "problem", None) or str(error))
    return f"line {mark.line + 1}: {what}" if mark is not None else f"it is not YAML: {what}"


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _refuse(node: yaml.Node, why: str) -> NoReturn:
    raise AdaptersFileInvalid(f"line {_line(node)}: {why}")


# Nodes to values.


def _fields(
    node: yaml.Node, what: str, *, required: tuple[str, ...] = (), optional: tuple[str, ...] = ()
) -> dict[str, yaml.Node]:
    fields: dict[str, yaml.Node] = {}
    for key, value in _pairs(node, what):
        if key.value not in (*required, *optional):
            _refuse(key, f"{shown(key.value)!r} is no key of {what}; known are {', '.join((*required, *optional))}")
        fields[key.value] = value
    for name in required:
        if name not in fields:
            _refuse(node, f"{what} needs the key {name!r}")
    return fields


def _pairs(node: yaml.Node, what: str) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
    """Key and value; keys are text, each once."""
    if not isinstance(node, yaml.MappingNode):
        _refuse(node, f"{what} must be keys with values, not {_kind(node)}")
    lines: dict[str, int] = {}
    for key, value in node.value:
        _text(key, f"a key of {what}")
        if key.value in lines:
            _refuse(key, f"the key {shown(key.value)!r} stands in line {lines[key.value]} already")
        lines[key.value] = _line(key)
        yield key, value


def _items(node: yaml.Node | None, what: str) -> list[yaml.Node]:
    if node is None:
        return []
    if not isinstance(node, yaml.SequenceNode):
        _refuse(node, f"{what} must be a list, not {_kind(node)}")
    return list(node.value)


def _adapter(node: yaml.Node, folder: Path) -> WantedAdapter:
    optional = ("pin", "ttl", "priority", "ignore", "moe_lora_b_layout")
    fields = _fields(node, "an adapter", required=("name", "source"), optional=optional)
    ttl = fields.get("ttl")
    return WantedAdapter(
        name=_name(fields["name"]),
        source=_loaded_as(_source(fields["source"], folder), fields, node),
        pin=_truth(fields["pin"], "pin") if "pin" in fields else False,
        ttl=None if ttl is None or _is(ttl, "null") else _number(ttl, "ttl", over_zero=True),
        priority=_whole(fields["priority"], "priority") if "priority" in fields else 0,
        managed_by=FILE_OWNER,
    )


def _loaded_as(source: str, fields: Mapping[str, yaml.Node], node: yaml.Node) -> str:
    """The source with its load options."""
    ignore, layout = fields.get("ignore"), fields.get("moe_lora_b_layout")
    patterns = tuple(_text(item, "a pattern of ignore") for item in _items(ignore, "ignore"))
    try:
        asked = ReadOptions(
            ignore=patterns, moe_lora_b_layout=None if layout is None else _text(layout, "moe_lora_b_layout")
        )
        return with_options(source, asked)
    except AdapterOptionInvalid as error:
        _refuse(ignore or layout or node, str(error))


def _aliases(node: yaml.Node | None, adapters: Mapping[str, int]) -> dict[str, tuple[AliasTarget, ...]]:
    aliases: dict[str, tuple[AliasTarget, ...]] = {}
    for key, value in _pairs(node, "aliases") if node is not None else ():
        name = _name(key)
        if name in adapters:
            _refuse(key, f"{name!r} is an adapter's name (line {adapters[name]}) and cannot be an alias too")
        targets = tuple(_target(item) for item in _items(value, f"the alias {name!r}"))
        if not sum(target.weight for target in targets) > 0:
            _refuse(value, f"the alias {name!r} needs a target with a weight over zero")
        aliases[name] = targets
    return aliases


def _target(node: yaml.Node) -> AliasTarget:
    fields = _fields(node, "an alias's target", required=("adapter",), optional=("weight",))
    weight = _number(fields["weight"], "weight", over_zero=False) if "weight" in fields else 1.0
    target = parse_target(_text(fields["adapter"], "adapter"), weight)
    _check_name(fields["adapter"], target.adapter)
    return target


def _name(node: yaml.Node) -> str:
    return _check_name(node, _text(node, "a name"))


def _check_name(node: yaml.Node, name: str) -> str:
    try:
        check_adapter_name(name)
    except AdapterNameInvalid as error:
        _refuse(node, str(error))
    return name


def _source(node: yaml.Node, folder: Path) -> str:
    source = _text(node, "source")
    if not source or len(source) > _MAX_SOURCE_CHARS or not source.isprintable():
        _refuse(node, f"a source is 1 to {_MAX_SOURCE_CHARS} printable characters")
    return source if _SCHEME.match(source) else os.path.normpath(folder / source)


def _text(node: yaml.Node, what: str) -> str:
    if not isinstance(node, yaml.ScalarNode) or not _is(node, "str"):
        hint = "; put it in quotes" if isinstance(node, yaml.ScalarNode) else ""
        _refuse(node, f"{what} must be text, not {_kind(node)}{hint}")
    return str(node.value)


def _truth(node: yaml.Node, what: str) -> bool:
    if not _is(node, "bool") or node.value not in ("true", "false"):
        _refuse(node, f"{what} must be true or false, not {_kind(node)}")
    return bool(node.value == "true")


def _whole(node: yaml.Node, what: str) -> int:
    if not _is(node, "int") or not re.fullmatch(r"-?[0-9]{1,9}", node.value):
        _refuse(node, f"{what} must be a whole number of up to 9 digits, not {_kind(node)}")
    return int(node.value)


def _number(node: yaml.Node, what: str, *, over_zero: bool) -> float:
    is_number = (_is(node, "int") or _is(node, "float")) and re.fullmatch(r"-?[0-9.]+([eE][-+]?[0-9]+)?", node.value)
    value = float(node.value) if is_number else math.nan
    if not math.isfinite(value) or value < 0 or (over_zero and value == 0):
        _refuse(node, f"{what} must be a number {'over' if over_zero else 'from'} zero, not {_kind(node)}")
    return value


def _is(node: yaml.Node, kind: str) -> bool:
    return bool(node.tag == _TAG + kind)


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return repr(shown(node.value, 40)) if node.value else "nothing"
    return "a list" if isinstance(node, yaml.SequenceNode) else "keys with values"
