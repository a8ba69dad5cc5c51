"""The commands of `python -m loadtest`: finds the one typed, exits 1 with a line when a measurement cannot stand.

A command is a module with `HELP`, `add_arguments(parser)` and `main(arguments)`, which returns the exit status.
"""

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType

import aiohttp

from loadtest import (
    bench_command,
    churn_command,
    extras,
    gpu_command,
    kernels,
    peers_command,
    run_command,
    tiers_command,
)
from loadtest.client import LoadTestFailed
from loadtest.proof import MixDiffers

_COMMANDS: dict[str, ModuleType] = {
    "run": run_command,
    "bench": bench_command,
    "peers": peers_command,
    "kernels": kernels,
    "extras": extras,
    "churn": churn_command,
    "tiers": tiers_command,
    "gpu": gpu_command,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest", description="Measures servers from outside, over HTTP.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in _COMMANDS.items():
        command.add_arguments(commands.add_parser(name, help=command.HELP))
    return parser


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    command = _COMMANDS[arguments.command]
    try:
        status: int = command.main(arguments)
        return status
    except (ValueError, LoadTestFailed, MixDiffers, OSError, aiohttp.ClientError) as error:
        failure: BaseException = error
    except ExceptionGroup as group:
        failure = group.exceptions[0]
        while isinstance(failure, ExceptionGroup):
            failure = failure.exceptions[0]
        if not isinstance(failure, LoadTestFailed | OSError | aiohttp.ClientError):
            raise
    print(f"FAILED: {str(failure) or type(failure).__name__}", file=sys.stderr)
    return 1
