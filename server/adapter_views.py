"""Adapters and aliases as people see them in a terminal, and as lines with tabs elsewhere. Knows nothing of HTTP.

What a server says is data: no text of it is read as markup, and characters that steer a terminal are shown as escapes.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from adapters.untrusted_json import shown
from server.memory_size import format_memory

Description = Mapping[str, Any]

COLUMNS = ("name", "version", "rank", "size", "state", "tier", "in use", "pin", "source")
_ALIAS_COLUMNS = ("alias", "adapter", "weight")
_STYLES = {"failed": "red", "draining": "yellow", "fetching": "cyan", "validating": "cyan", "active": "green"}
_MAX_CHARS = 400
_NONE = "-"


def show_adapters(adapters: Sequence[Description], console: Console) -> None:
    """A table on a terminal, tab-separated lines elsewhere."""
    if not console.is_terminal:
        for row in (COLUMNS, *(adapter_row(adapter) for adapter in adapters)):
            print("\t".join(row))
    elif adapters:
        console.print(adapter_table(adapters))
    else:
        console.print("no adapters are loaded; load one with: loramux adapters load NAME SOURCE")


def adapter_table(adapters: Iterable[Description]) -> Table:
    table = Table(*COLUMNS, box=None, header_style="bold")
    for adapter in adapters:
        style = _STYLES.get(str(adapter.get("state")), "")
        table.add_row(*(Text(cell, style if column == "state" else "") for column, cell in _cells(adapter)))
    return table


def _cells(adapter: Description) -> Iterable[tuple[str, str]]:
    return zip(COLUMNS, adapter_row(adapter), strict=True)


def adapter_row(adapter: Description) -> tuple[str, ...]:
    """What is not known yet, because the adapter was never loaded, is -."""
    return (
        _shown(adapter.get("name")),
        _shown(adapter.get("version"))[:12],
        _shown(adapter.get("lora_rank")),
        _size(adapter.get("num_bytes")),
        _state(adapter),
        _shown(adapter.get("tier")),
        _shown(adapter.get("leases")),
        "pinned" if adapter.get("pin") else _NONE,
        _shown(adapter.get("source") or adapter.get("pending")),
    )


def _state(adapter: Description) -> str:
    """With how far its load is, as soon as there is something to say of that."""
    state, progress = _shown(adapter.get("state")), adapter.get("progress") or {}
    match progress.get("done"), progress.get("total"):
        case int(done), int(total) if 0 < done <= total:
            share = f"{100 * done // total}%"
            return f"{state} {share}" if state in ("fetching", "validating") else f"{state}, new {share}"
    return state


def failure_of(adapter: Description) -> str | None:
    """Why the last load failed, code first; None when it did not."""
    match adapter.get("failure"):
        case {"code": code, "why": why} | [code, why]:
            return _shown(f"{code}: {why}")
        case None:
            return None
        case other:
            return _shown(other)


def event_line(adapter: Description) -> str:
    """A change of one adapter, for a log: the columns of the list, and why it failed if it did."""
    failure = failure_of(adapter)
    return "\t".join((*adapter_row(adapter), *([failure] if failure else [])))


def show_description(adapter: Description, console: Console) -> None:
    """Everything a server says of one adapter, a field a line; its report below."""
    fields = {key: value for key, value in adapter.items() if key not in ("report", "object")}
    for line in [*_field_lines(fields, indent=0), *report_lines(adapter.get("report") or {})]:
        print_line(line, console)


def show_loaded(adapter: Description, console: Console) -> None:
    """What a load came to: one row, and on a terminal the report."""
    show_adapters([adapter], console)
    if console.is_terminal:
        for line in report_lines(adapter.get("report") or {}):
            print_line(line, console)


def report_lines(report: Mapping[str, Any]) -> list[str]:
    if not report:
        return []
    kinds = ", ".join(f"{kind} x {count}" for kind, count in dict(report.get("modules") or {}).items())
    rest = {key: value for key, value in report.items() if key not in ("modules", "num_modules", "warnings")}
    warnings = [_line("warning", warning, 2) for warning in report.get("warnings") or ()]
    return [
        "report",
        _line("modules", f"{report.get('num_modules', '?')}: {kinds}", 2),
        *_field_lines(rest, 2),
        *warnings,
    ]


def _field_lines(fields: Mapping[str, Any], indent: int) -> list[str]:
    return [_line(key, _plain(key, value), indent) for key, value in fields.items() if value not in (None, [], {})]


def _plain(key: str, value: object) -> str:
    if key == "num_bytes" and isinstance(value, int):
        return f"{format_memory(value)} ({value})"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {each}" for name, each in value.items())
    if isinstance(value, list):
        return ", ".join(str(each) for each in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _line(key: str, value: object, indent: int) -> str:
    return f"{' ' * indent}{_shown(key):<{16 - indent}}{shown(str(value), 10 * _MAX_CHARS)}"


def show_aliases(aliases: Sequence[Description], console: Console) -> None:
    rows = [row for alias in aliases for row in _alias_rows(alias)]
    if not console.is_terminal:
        for row in (_ALIAS_COLUMNS, *rows):
            print("\t".join(row))
        return
    table = Table(*_ALIAS_COLUMNS, box=None, header_style="bold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table if rows else "there are no aliases; make one with: loramux adapters alias NAME ADAPTER=WEIGHT")


def _alias_rows(alias: Description) -> list[tuple[str, str, str]]:
    name = _shown(alias.get("name"))
    return [(name, _target(each), f"{each.get('weight', 1):g}") for each in alias.get("targets") or ()]


def _target(target: Description) -> str:
    """As it is written: an adapter, or one version of it."""
    version = target.get("version")
    return _shown(target.get("adapter")) + (f"@{_shown(version)[:12]}" if version else "")


def unloaded_line(name: str, answer: Description) -> str:
    """What a deletion came to."""
    if answer.get("state") == "draining":
        return f"{name} is draining: the name is gone, its memory is freed when the requests that use it have ended"
    freed = answer.get("freed") or {}
    kinds = (("host", freed.get("host_bytes")), ("device", freed.get("device_bytes")))
    amounts = [f"{format_memory(int(count))} of {kind} memory" for kind, count in kinds if count]
    return f"{name} is unloaded" + (f"; {' and '.join(amounts)} freed" if amounts else "")


def print_line(text: str, console: Console) -> None:
    """As it is: no markup, no wrapping."""
    console.print(Text(text), soft_wrap=True)


def _shown(value: object) -> str:
    return _NONE if value is None or value == "" else shown(str(value), _MAX_CHARS)


def _size(num_bytes: object) -> str:
    return format_memory(num_bytes) if isinstance(num_bytes, int) else _NONE
