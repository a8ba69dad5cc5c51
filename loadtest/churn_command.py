"""`python -m loadtest churn`: its arguments, and a server with room for fewer adapters than are asked for."""

import argparse
import asyncio
import json
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from loadtest import server_commands, servers
from loadtest.churn import ChurnResult, ChurnSettings, churn
from loadtest.churn_adapters import pool_bytes, write_sources
from loadtest.churn_operator import KINDS
from loadtest.client import Target
from loadtest.model_list import fetch_models
from loadtest.peers_weights import base_folder
from loadtest.report import describe_machine

HELP = "clients decode while adapters come and go: no token of another adapter, no request lost"

_DEFAULTS = ChurnSettings()
_VALUE_BYTES = {"bfloat16": 2, "float32": 4}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-tokens", type=int, default=_DEFAULTS.num_tokens, help="output tokens to check")
    parser.add_argument("--num-clients", type=int, default=_DEFAULTS.num_clients)
    parser.add_argument("--num-adapters", type=int, default=_DEFAULTS.num_adapters)
    parser.add_argument("--interval-ms", type=float, default=_DEFAULTS.interval * 1e3, help="between two operations")
    parser.add_argument("--device-room", type=int, default=_DEFAULTS.device_room, help="adapters of the mean rank")
    parser.add_argument("--host-room", type=int, default=_DEFAULTS.host_room, help="adapters; 0 = no limit")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"operations, of {','.join(KINDS)}")
    parser.add_argument("--seed", type=int, default=_DEFAULTS.seed)
    parser.add_argument("--model", type=Path, help="a folder laid out as Llama; the default model if unset")
    parser.add_argument("--dtype", choices=sorted(_VALUE_BYTES), default="bfloat16")
    parser.add_argument("--serve-flags", default="", help="more flags for the server, as one string")
    parser.add_argument("--results", type=Path, default=Path("bench-results"))


def main(arguments: argparse.Namespace) -> int:
    """0 when nothing was wrong, 1 otherwise."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # the server must be taken down too
    settings = settings_from(arguments)
    with tempfile.TemporaryDirectory(prefix="churn-") as folder:
        model = arguments.model or base_folder()
        print(f"Writing {settings.num_sources} random adapters (once)", flush=True)
        folders = write_sources(Path(folder) / "adapters", model, settings.num_sources)
        with _server(arguments, settings, model) as url:
            base = asyncio.run(fetch_models(Target(url, lambda _: {}))).bases[0]
            result = asyncio.run(churn(url, base, folders, settings))
    print(f"\n{result}\n\n{describe_machine()}; {arguments.model or 'the default model'}, {arguments.dtype}.")
    _write(arguments.results, settings, result)
    print("CLEAN" if result.is_clean else "NOT CLEAN")
    return 0 if result.is_clean else 1


def settings_from(arguments: argparse.Namespace) -> ChurnSettings:
    """Raises ValueError for kinds that do not exist."""
    kinds = tuple(arguments.kinds.split(","))
    if unknown := sorted(set(kinds) - set(KINDS)):
        raise ValueError(f"--kinds {', '.join(unknown)}: there are {', '.join(KINDS)}")
    return ChurnSettings(
        num_tokens=arguments.num_tokens,
        num_clients=arguments.num_clients,
        num_adapters=arguments.num_adapters,
        num_sources=arguments.num_adapters * 4 // 3,
        interval=arguments.interval_ms / 1e3,
        kinds=kinds,
        device_room=arguments.device_room,
        host_room=arguments.host_room or None,
        seed=arguments.seed,
    )


@contextmanager
def _server(arguments: argparse.Namespace, settings: ChurnSettings, model: Path) -> Iterator[str]:
    """Ours, with rooms as the settings say; its log lies in the results' folder."""
    room = pool_bytes(model, settings.device_room, bytes_per_value=_VALUE_BYTES[arguments.dtype])
    flags = ["--dtype", arguments.dtype, "--lora-memory", str(room), *shlex.split(arguments.serve_flags)]
    if settings.host_room is not None:
        flags += ["--max-cpu-loras", str(settings.host_room)]
    if arguments.model is not None:
        flags = [str(arguments.model), *flags]
    start = server_commands.loramux_command([], port := servers.free_port(), *flags)
    with servers.running(start.arguments, port=port, log=arguments.results / "churn-server.log") as server:
        yield server.url


def _write(folder: Path, settings: ChurnSettings, result: ChurnResult) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    verdict = asdict(result.verdict)
    record = {
        "machine": describe_machine(),
        "settings": asdict(settings),
        "verdict": verdict,
        "operations": result.operations,
        "faults": result.faults,
        "seconds": result.seconds,
    }
    (folder / "churn.json").write_text(json.dumps(record, indent=2) + "\n")
    (folder / "churn.md").write_text(f"{result}\n")
