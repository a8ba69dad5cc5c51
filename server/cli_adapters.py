"""`loramux adapters ls|load|upload|unload|describe|pin|unpin|alias|rollback|watch`: a running server's adapters.

Says what is asked of the server and what is shown of its answer; knows nothing of HTTP.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.types import NonNegativeFloat, PositiveFloat
from rich.console import Console

from server.adapter_client import AdapterClient, AdapterSettings, Reply, ServerSaidNo
from server.adapter_progress import finish_load, sending
from server.adapter_upload import AdapterUpload, UploadImpossible
from server.adapter_views import show_adapters, show_aliases, show_description, show_loaded, unloaded_line
from server.adapter_watch import watch_adapters
from server.cli_failure import CommandFailed
from server.config import HTTPConfig

_URL = f"http://{HTTPConfig().host}:{HTTPConfig().port}"
_FIRST_WAIT = 1.0  # seconds the server takes before it says that it is still at work; then it is asked for progress
_ELSEWHERE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|upload:")
_WEIGHT = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")

Url = Annotated[str, Parameter(help="The running server.")]
AdminKey = Annotated[
    str | None,
    Parameter(env_var=["LORAMUX_ADMIN_API_KEY", "LORAMUX_API_KEY"], help="The server's admin key, or its only key."),
]
Json = Annotated[bool, Parameter(name="--json", negative="", help="Print the server's own answer.")]


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How an adapter is loaded.

    Parameters
    ----------
    load_inplace
        Replace what the name stands for now; requests under way finish on the old weights.
    pin
        Keep it in host memory, whatever else needs the room.
    ttl
        Seconds after its last change at which the name is taken away.
    priority
        The higher, the later it leaves host memory; 0 if unset.
    ignore
        Leave out tensors whose whole name matches the pattern, such as '*.inv_freq'; may be given again.
    moe_lora_b_layout
        How B of fused experts is stored, where the adapter's files do not say.
    wait
        Wait until it is loaded; else answer as soon as the server has taken the order down.
    timeout
        Seconds to wait; without end if unset.
    """

    load_inplace: Annotated[bool, Parameter(negative="")] = False
    pin: Annotated[bool, Parameter(negative="")] = False
    ttl: PositiveFloat | None = None
    priority: int | None = None
    ignore: Annotated[tuple[str, ...], Parameter(negative="")] = ()
    moe_lora_b_layout: Literal["rank_major", "grouped_by_expert"] | None = None
    wait: bool = True
    timeout: PositiveFloat | None = None

    @property
    def settings(self) -> AdapterSettings:
        return AdapterSettings(
            pin=self.pin or None,
            ttl=self.ttl,
            priority=self.priority,
            load_inplace=self.load_inplace or None,
            ignore=self.ignore,
            moe_lora_b_layout=self.moe_lora_b_layout,
        )

    @property
    def first_wait(self) -> float:
        return min(_FIRST_WAIT, self.timeout or _FIRST_WAIT) if self.wait else 0.0


_PLAIN_LOAD = LoadOptions()


def list_command(*, as_json: Json = False, url: Url = _URL, admin_api_key: AdminKey = None) -> None:
    """Show the adapters a server has: a table on a terminal, tab-separated lines elsewhere."""
    with _failing_for_people():
        adapters = AdapterClient(url, admin_api_key).list()
    print(json.dumps(adapters)) if as_json else show_adapters(adapters, Console())


def load_command(
    name: str, source: str, /, *, load: LoadOptions = _PLAIN_LOAD, url: Url = _URL, admin_api_key: AdminKey = None
) -> None:
    """Load an adapter into a running server.

    Parameters
    ----------
    name
        What clients will send as `model`.
    source
        Its folder, as the server sees it, or hf://org/repo, s3://…, https://….
    """
    place = source if _ELSEWHERE.match(source) else str(Path(source).absolute())
    client = AdapterClient(url, admin_api_key)
    with _failing_for_people():
        reply = client.load(name, place, load.settings, wait=load.first_wait)
        _show_end(client, reply, name, load)


def upload_command(
    name: str, folder: Path, /, *, load: LoadOptions = _PLAIN_LOAD, url: Url = _URL, admin_api_key: AdminKey = None
) -> None:
    """Send an adapter from this machine to a running server, and load it there.

    Parameters
    ----------
    name
        What clients will send as `model`.
    folder
        Its folder here: config, weights (one file or shards, PEFT's or MLX-LM's) and tokenizer are sent.
    """
    client = AdapterClient(url, admin_api_key)
    with _failing_for_people():
        upload = AdapterUpload.of(folder)
        with sending(name, upload.num_bytes) as sent:
            reply = client.upload(name, upload, load.settings, wait=load.first_wait, sent=sent)
        _show_end(client, reply, name, load)


def _show_end(client: AdapterClient, reply: Reply, name: str, load: LoadOptions) -> None:
    adapter = finish_load(client, reply, name, timeout=load.timeout) if load.wait else reply.body
    show_loaded(adapter, Console())


def unload_command(
    name: str,
    /,
    *,
    mode: Literal["drain", "abort"] | None = None,
    deadline: NonNegativeFloat | None = None,
    url: Url = _URL,
    admin_api_key: AdminKey = None,
) -> None:
    """Take an adapter's name away at once.

    Parameters
    ----------
    name
        The adapter's name.
    mode
        What becomes of requests under way: `drain` lets them finish, `abort` ends them.
    deadline
        Seconds that draining requests have before they are ended.
    """
    with _failing_for_people():
        reply = AdapterClient(url, admin_api_key).unload(name, mode=mode, deadline=deadline)
    print(unloaded_line(name, reply.body))


def describe_command(name: str, /, *, as_json: Json = False, url: Url = _URL, admin_api_key: AdminKey = None) -> None:
    """Show everything a server says of one adapter.

    Parameters
    ----------
    name
        The adapter's name.
    """
    with _failing_for_people():
        adapter = AdapterClient(url, admin_api_key).describe(name)
    print(json.dumps(adapter)) if as_json else show_description(adapter, Console())


def pin_command(name: str, /, *, url: Url = _URL, admin_api_key: AdminKey = None) -> None:
    """Keep an adapter in host memory, whatever else needs the room.

    Parameters
    ----------
    name
        The adapter's name.
    """
    with _failing_for_people():
        AdapterClient(url, admin_api_key).change(name, AdapterSettings(pin=True))
    print(f"{name} is pinned")


def unpin_command(name: str, /, *, url: Url = _URL, admin_api_key: AdminKey = None) -> None:
    """Let an adapter leave host memory again when others need the room.

    Parameters
    ----------
    name
        The adapter's name.
    """
    with _failing_for_people():
        AdapterClient(url, admin_api_key).change(name, AdapterSettings(pin=False))
    print(f"{name} is not pinned")


def alias_command(
    name: str | None = None,
    /,
    *targets: str,
    remove: Annotated[bool, Parameter(negative="")] = False,
    url: Url = _URL,
    admin_api_key: AdminKey = None,
) -> None:
    """Make, move, show or remove an alias: a name that leads to adapters by weight.

    Parameters
    ----------
    name
        The alias; all are shown without one.
    targets
        Where it leads, ADAPTER=WEIGHT each: sql=90 sql@1234abcd=10. One alone needs no weight. Shown without any.
    remove
        Take the alias away.
    """
    client = AdapterClient(url, admin_api_key)
    with _failing_for_people():
        if name is not None and remove:
            client.remove_alias(name)
            print(f"{name} is removed")
            return
        if name is None:
            aliases = client.aliases()
        elif targets:
            aliases = [client.put_alias(name, [_target(text) for text in targets])]
        else:
            aliases = [client.describe_alias(name)]
    show_aliases(aliases, Console())


def rollback_command(name: str, /, *, url: Url = _URL, admin_api_key: AdminKey = None) -> None:
    """Let a name, an adapter's or an alias, stand for what it stood for before.

    Parameters
    ----------
    name
        The adapter's or the alias's name.
    """
    client = AdapterClient(url, admin_api_key)
    with _failing_for_people():
        try:
            show_adapters([client.roll_back(name)], Console())
        except ServerSaidNo as error:
            if error.status != 404:
                raise
            show_aliases([_rolled_back_alias(client, name, error)], Console())


def _rolled_back_alias(client: AdapterClient, name: str, not_an_adapter: ServerSaidNo) -> dict[str, object]:
    try:
        return client.roll_back_alias(name)
    except ServerSaidNo as error:
        raise (not_an_adapter if error.status == 404 else error) from None


def watch_command(name: str | None = None, /, *, url: Url = _URL, admin_api_key: AdminKey = None) -> None:
    """Show the adapters as they change, until interrupted: a live table on a terminal, a line per change elsewhere.

    Parameters
    ----------
    name
        Only this adapter.
    """
    with _failing_for_people():
        try:
            watch_adapters(AdapterClient(url, admin_api_key), name, Console())
        except KeyboardInterrupt:
            return


def _target(text: str) -> tuple[str, float]:
    """sql=90 → (sql, 90); sql → (sql, 1)."""
    adapter, sign, weight = text.rpartition("=")
    if not sign:
        return text, 1.0
    if not adapter or not _WEIGHT.fullmatch(weight):
        raise CommandFailed(f"{text!r} is no target; write ADAPTER=WEIGHT, such as sql=90")
    return adapter, float(weight)


@contextmanager
def _failing_for_people() -> Iterator[None]:
    try:
        yield
    except (ServerSaidNo, UploadImpossible) as error:
        raise CommandFailed(str(error)) from error
