"""Waits for a load that a server acknowledged, with a bar while it works. Draws nothing where nobody looks."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, Task, TaskID, TextColumn, TransferSpeedColumn
from rich.text import Text

from server.adapter_client import AdapterClient, Reply, ServerSaidNo
from server.adapter_views import failure_of

_POLL_SECONDS = 0.25
_AT_WORK = ("fetching", "validating")


def finish_load(
    client: AdapterClient,
    reply: Reply,
    name: str,
    *,
    timeout: float | None,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """What `name` is once the load has ended. Raises ServerSaidNo when it failed or did not end within `timeout`."""
    if reply.is_done:
        return reply.body
    deadline = None if timeout is None else time.monotonic() + timeout
    with LoadBar(name) as bar:
        adapter = reply.body
        while _is_at_work(adapter):
            bar.show(adapter)
            if deadline is not None and time.monotonic() >= deadline:
                raise ServerSaidNo(f"{name} is still {adapter.get('state')}; see: loramux adapters describe {name}")
            sleep(_POLL_SECONDS)
            adapter = client.describe(name)
    if (why := failure_of(adapter)) is not None:
        raise ServerSaidNo(why)
    return adapter


def _is_at_work(adapter: Mapping[str, Any]) -> bool:
    """Also while the name still serves what it stood for before."""
    return adapter.get("state") in _AT_WORK or adapter.get("pending") is not None


class _Amount(DownloadColumn):
    def render(self, task: Task) -> Text:
        if not task.fields["counts_norms"]:
            return super().render(task)
        return Text(f"{task.completed:,.0f}/{task.total or 0:,.0f} norms", style="progress.download")


class _Speed(TransferSpeedColumn):
    def render(self, task: Task) -> Text:
        return Text() if task.fields["counts_norms"] else super().render(task)


class LoadBar:
    """A line on stderr that goes away at the end; nothing when stderr is no terminal."""

    def __init__(self, name: str) -> None:
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            _Amount(binary_units=True),
            _Speed(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._name = name
        self._task: TaskID | None = None

    def __enter__(self) -> "LoadBar":
        self._progress.start()
        self._task = self._progress.add_task(self._name, total=None, visible=False, counts_norms=False)
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, adapter: Mapping[str, Any]) -> None:
        """The state, and how many bytes, or norms, of how many there are."""
        progress = adapter.get("progress") or {}
        if self._task is not None:
            self._progress.update(
                self._task,
                description=f"{self._name} {adapter.get('state')}",
                completed=progress.get("done") or 0,
                total=progress.get("total"),
                visible=True,
                counts_norms=progress.get("unit") == "norms",
            )


@contextmanager
def sending(name: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar for bytes that go to the server: call what is yielded with the size of each piece sent."""
    done = 0
    with LoadBar(name) as bar:

        def sent(count: int) -> None:
            nonlocal done
            done += count
            bar.show({"state": "sending", "progress": {"done": done, "total": num_bytes}})

        yield sent


@contextmanager
def computing(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for norms of the base's rows: call what is yielded with how many are done, and how many there are."""
    with LoadBar(name) as bar:

        def show(done: int, total: int) -> None:
            bar.show({"state": "computing", "progress": {"unit": "norms", "done": done, "total": total}})

        yield show
