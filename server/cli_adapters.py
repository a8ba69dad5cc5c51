"""`loramux adapters ls|load|unload`: a running server's adapters. Knows how to show them, nothing of HTTP."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from server.adapter_client import AdapterClient, ServerSaidNo
from server.cli_failure import CommandFailed
from server.config import HTTPConfig
from server.memory_size import format_memory

_URL = f"http://{HTTPConfig().host}:{HTTPConfig().port}"
_COLUMNS = ("name", "version", "rank", "size", "state", "in use", "source")

Url = Annotated[str, Parameter(help="The running server.")]
AdminKey = Annotated[
    str | None,
    Parameter(env_var=["LORAMUX_ADMIN_API_KEY", "LORAMUX_API_KEY"], help="The server's admin key, or its only key."),
]


def list_command(*, url: Url = _URL, admin_api_key: AdminKey = None) -> None:
    """Show the adapters a server has: a table on a terminal, tab-separated lines elsewhere."""
    with _failing_for_people():
        show_adapters(AdapterClient(url, admin_api_key).list(), Console())


def load_command(
    name: str,
    source: Path,
    /,
    *,
    load_inplace: Annotated[bool, Parameter(negative="")] = False,
    url: Url = _URL,
    admin_api_key: AdminKey = None,
) -> None:
    """Load an adapter into a running server.

    Parameters
    ----------
    name
        What clients will send as `model`.
    source
        Its folder, as the server sees it.
    load_inplace
        Replace what the name stands for now; requests under way finish on the old weights.
    """
    with _failing_for_people():
        adapter = AdapterClient(url, admin_api_key).load(name, str(source.absolute()), load_inplace=load_inplace)
    show_adapters([adapter], Console())


def unload_command(name: str, /, *, url: Url = _URL, admin_api_key: AdminKey = None) -> None:
    """Take an adapter's name away at once; requests under way finish.

    Parameters
    ----------
    name
        The adapter's name.
    """
    with _failing_for_people():
        AdapterClient(url, admin_api_key).unload(name)
    print(f"{name} is unloaded")


@contextmanager
def _failing_for_people() -> Iterator[None]:
    try:
        yield
    except ServerSaidNo as error:
        raise CommandFailed(str(error)) from error


def show_adapters(adapters: list[dict[str, Any]], console: Console) -> None:
    """A table on a terminal, tab-separated lines elsewhere."""
    rows = [_row(adapter) for adapter in adapters]
    if not console.is_terminal:
        for row in (_COLUMNS, *rows):
            print("\t".join(row))
        return
    table = Table(*_COLUMNS, box=None, header_style="bold")
    for row in rows:
        table.add_row(*row)
    console.print(table if rows else "no adapters are loaded; load one with: loramux adapters load NAME FOLDER")


def _row(adapter: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        str(adapter["name"]),
        str(adapter["version"])[:12],
        str(adapter["lora_rank"]),
        format_memory(int(adapter["num_bytes"])),
        str(adapter["state"]),
        str(adapter["leases"]),
        str(adapter["source"]),
    )
