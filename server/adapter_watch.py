"""`loramux adapters watch`: a live table on a terminal, a line per change elsewhere. Knows nothing of HTTP."""

import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from server.adapter_client import AdapterClient, ServerSaidNo
from server.adapter_views import COLUMNS, adapter_table, event_line, print_line

_AGAIN_SECONDS = 1.0
_GONE = "unloaded"

Key = tuple[str, str | None]


class AdapterRows:
    """What a server has now, from its descriptions one after the other. A draining version is a row of its own."""

    def __init__(self) -> None:
        self._rows: dict[Key, dict[str, Any]] = {}

    def take(self, adapter: dict[str, Any]) -> None:
        name, version, state = str(adapter.get("name")), adapter.get("version"), adapter.get("state")
        if state not in ("draining", _GONE):
            self._rows[name, None] = adapter
            return
        named = self._rows.get((name, None))
        if named is not None and version in (None, named.get("version")):
            del self._rows[name, None]
        self._rows.pop((name, version), None)
        if state == "draining":
            self._rows[name, version] = adapter

    def clear(self) -> None:
        self._rows.clear()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter([self._rows[key] for key in sorted(self._rows, key=lambda key: (key[0], key[1] or ""))])


def watch_adapters(
    client: AdapterClient, name: str | None, console: Console, *, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Until interrupted. A stream that breaks off is opened again; raises ServerSaidNo when the first one fails."""
    if console.is_terminal:
        _watch_live(client, name, console, sleep)
    else:
        print("\t".join(COLUMNS), flush=True)
        for adapter in _descriptions(client, _say_lost, sleep):
            if adapter is not None and name in (None, adapter.get("name")):
                print(event_line(adapter), flush=True)


def _watch_live(client: AdapterClient, name: str | None, console: Console, sleep: Callable[[float], None]) -> None:
    rows = AdapterRows()
    with Live(adapter_table(rows), console=console, auto_refresh=False) as live:

        def say(text: str | None) -> None:
            table = adapter_table(rows)
            table.caption = None if text is None else Text(text)
            live.update(table, refresh=True)

        for adapter in _descriptions(client, say, sleep):
            if adapter is None:
                rows.clear()  # the stream begins with everything again
            elif name in (None, adapter.get("name")):
                rows.take(adapter)
                say(None)


def _descriptions(
    client: AdapterClient, lost: Callable[[str], None], sleep: Callable[[float], None]
) -> Iterator[dict[str, Any] | None]:
    """Descriptions without end; None where the stream was lost and begins anew."""
    was_connected, told = False, ""
    while True:
        try:
            for adapter in client.watch():
                was_connected, told = True, ""
                yield adapter
            why = "the server ended the stream"
        except ServerSaidNo as error:
            if not was_connected:
                raise
            why = str(error)
        if why != told:
            lost(f"{why}; trying again")
            told = why
        sleep(_AGAIN_SECONDS)
        yield None


def _say_lost(why: str) -> None:
    print_line(f"loramux: {why}", Console(stderr=True))
