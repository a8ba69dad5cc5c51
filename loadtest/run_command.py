"""`python -m loadtest run`: its arguments, and what it prints and writes of the run they describe."""

import argparse
import asyncio
import importlib
import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loadtest.arrivals import ARRIVALS, CLOSED, GAMMA, POISSON
from loadtest.client import LoadTestFailed, Target, by_model, check_loopback
from loadtest.goodput import Limits
from loadtest.lengths import FIXED, STANDARD
from loadtest.model_list import fetch_models
from loadtest.popularity import POPULARITIES
from loadtest.report import describe_machine, describe_workload
from loadtest.run import Measurement, measure_once
from loadtest.workload import Workload

HELP = "measure a running server: throughput, latencies, goodput, and the proof of the mix"

_DEFAULTS = Workload(models=("base",))
_BESIDE_JSON = Path()  # --plot without a path

_DESCRIPTION = """\
Sends a seeded workload to a server on this machine and measures it from outside, over HTTP. Fails, rather than prints a
figure, when the server ran another mix of adapters than the one asked for.
"""

_EXAMPLES = """\
examples:
  eight in flight over all adapters that the server lists:
    python -m loadtest run --url http://127.0.0.1:8000 --models-from-server
  the same machine at a thousand adapters of uneven popularity, then at five:
    ... --models-from-server --popularity zipf --num-requests 500 --warm-up 32
    ... --models-from-server --popularity zipf --num-requests 500 --warm-up 32 --num-adapters 5
  chat-like lengths at a quarter of their size, bursts of two requests a second, goodput, JSON and picture:
    ... --lengths p2 --scale 0.25 --rate 2 --cv 4 --goodput ttft=1000 tpot=100 --results bench-results --plot
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    _add_server(parser.add_argument_group("the server"))
    _add_traffic(parser.add_argument_group("when requests are sent"))
    _add_requests(parser.add_argument_group("what they ask for"))
    _add_output(parser.add_argument_group("what is reported"))


def main(arguments: argparse.Namespace) -> int:
    """0 when the run stands; 1 when it does with warnings and --strict was given."""
    check_loopback(arguments.url)
    if arguments.plot == _BESIDE_JSON and arguments.json is None and arguments.results is None:
        raise ValueError("--plot without a path goes beside the JSON; give it a path, or --json or --results")
    limits = Limits.parse(arguments.goodput) if arguments.goodput else None
    target = Target(arguments.url.rstrip("/"), by_model, arguments.api_key)
    workload, base, measurement = asyncio.run(_measure(target, arguments, limits))
    caption = f"{describe_workload(workload)}; {describe_machine()}"
    figures = measurement.figures
    print(f"{describe_workload(workload)}\n{describe_machine()}\n{figures}")
    _write(arguments, workload, base, measurement, caption)
    return 1 if arguments.strict and figures.warnings else 0


async def _measure(
    target: Target, arguments: argparse.Namespace, limits: Limits | None
) -> tuple[Workload, str | None, Measurement]:
    """(the workload, the name of the base in it, what was measured)."""
    models, base = await _models(target, arguments)
    workload = _workload(arguments, models)
    measurement = await measure_once(
        target,
        workload,
        base=base,
        limits=limits,
        max_errors=arguments.max_errors,
        sample_seconds=arguments.sample_seconds if arguments.plot is not None else None,
    )
    return workload, base, measurement


async def _models(target: Target, arguments: argparse.Namespace) -> tuple[tuple[str, ...], str | None]:
    if arguments.models is not None:
        if arguments.num_adapters is not None or arguments.with_base:
            raise ValueError("--num-adapters and --with-base choose from the server's list; use --models-from-server")
        return tuple(arguments.models.split(",")), arguments.base
    listed = await fetch_models(target)
    return listed.select(arguments.num_adapters, with_base=arguments.with_base), arguments.base or listed.bases[0]


def _workload(arguments: argparse.Namespace, models: tuple[str, ...]) -> Workload:
    arrivals = arguments.arrivals
    if arrivals is None:
        arrivals = CLOSED if arguments.rate is None else POISSON if arguments.cv == 1 else GAMMA
    return Workload(
        models=models,
        in_flight=arguments.in_flight,
        num_requests=arguments.num_requests,
        prompt_words=arguments.prompt_words,
        max_tokens=arguments.max_tokens,
        popularity=arguments.popularity,
        seed=arguments.seed,
        lengths=arguments.lengths,
        scale=arguments.scale,
        arrivals=arrivals,
        rate=arguments.rate,
        cv=arguments.cv,
        warm_up_requests=arguments.warm_up,
    )


def _write(
    arguments: argparse.Namespace, workload: Workload, base: str | None, measurement: Measurement, caption: str
) -> None:
    """JSON, table and picture where they were asked for; each is named as it is written."""
    json_path: Path | None = arguments.json
    if arguments.results is not None:
        stem = arguments.results / f"run-{datetime.now(UTC):%Y%m%d-%H%M%S}"
        json_path = json_path or stem.with_suffix(".json")
        _write_text(stem.with_suffix(".md"), f"{measurement.figures.markdown()}\n\n{caption}.\n")
    if json_path is not None:
        _write_text(json_path, json.dumps(_record(workload, base, measurement), indent=2) + "\n")
    if arguments.plot is not None:
        path: Path = arguments.plot
        if json_path is not None and path == _BESIDE_JSON:
            path = json_path.with_suffix(".png")
        _draw(measurement, path, caption, base)


def _draw(measurement: Measurement, path: Path, caption: str, base: str | None) -> None:
    # Loaded only now: matplotlib takes a second of a core and 60 MB that the server under test should have.
    try:
        plot = importlib.import_module("loadtest.plot")
    except ModuleNotFoundError as error:
        raise LoadTestFailed(f"--plot needs {error.name}; install the extra: pip install loramux[bench]") from error
    plot.draw(measurement, path, title=caption, base=base)
    print(f"Written to {path}")


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    print(f"Written to {path}")


def _record(workload: Workload, base: str | None, measurement: Measurement) -> dict[str, Any]:
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "base": base,
        "workload": asdict(workload),
        "figures": measurement.figures.to_dict(),
    }


def _add_server(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--url", required=True, help="of a server on this machine")
    models = group.add_mutually_exclusive_group(required=True)
    models.add_argument("--models", metavar="A,B,…", help="model names, separated by commas")
    models.add_argument("--models-from-server", action="store_true", help="the adapters listed at /v1/models")
    group.add_argument("--num-adapters", type=int, metavar="N", help="only the first N of that list; 0 is base only")
    group.add_argument("--with-base", action="store_true", help="the base model too, after the adapters of that list")
    group.add_argument("--base", metavar="NAME", help="the name that means no adapter (from the list if unset)")
    group.add_argument("--api-key", metavar="KEY")


def _add_traffic(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--in-flight",
        **_number(int, _DEFAULTS.in_flight, "N", "closed loop: requests at any time, the next sent when one ends"),
    )
    group.add_argument(
        "--rate", type=float, metavar="R", help="open loop: R requests/s, whatever became of those before"
    )
    group.add_argument("--cv", **_number(float, _DEFAULTS.cv, "X", "of the gaps: 1 is Poisson, 4 is bursty"))
    group.add_argument(
        "--arrivals", choices=ARRIVALS, help="what --rate and --cv say, if unset; constant has equal gaps"
    )
    group.add_argument("--num-requests", **_number(int, _DEFAULTS.num_requests, "N", "in all, warm-up apart"))
    group.add_argument(
        "--warm-up",
        type=int,
        metavar="N",
        help="requests sent before (each model once, at least --in-flight, if unset)",
    )
    group.add_argument("--seed", **_number(int, _DEFAULTS.seed, "N", "of prompts, lengths, models and arrivals"))


def _add_requests(group: argparse._ArgumentGroup) -> None:
    standard = "; ".join(f"{name}: {lengths.text}" for name, lengths in STANDARD.items())
    group.add_argument(
        "--popularity",
        metavar="NAME",
        default=_DEFAULTS.popularity,
        help=f"which models are asked for: {', '.join(POPULARITIES)} (default {_DEFAULTS.popularity})",
    )
    group.add_argument(
        "--lengths", choices=(FIXED, *STANDARD), default=_DEFAULTS.lengths, help=f"fixed: the next two; {standard}"
    )
    group.add_argument("--prompt-words", **_number(int, _DEFAULTS.prompt_words, "N", "about as many tokens, if fixed"))
    group.add_argument("--max-tokens", **_number(int, _DEFAULTS.max_tokens, "N", "output tokens, if fixed"))
    group.add_argument("--scale", **_number(float, _DEFAULTS.scale, "X", "times all lengths; small machines: 0.25"))


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--goodput", nargs="+", metavar="LIMIT", help="also requests/s that met all of ttft=MS tpot=MS e2e=MS"
    )
    group.add_argument("--max-errors", **_number(int, 0, "N", "requests that may fail before the run does"))
    group.add_argument("--strict", action="store_true", help="exit with 1 when the figures carry a warning")
    group.add_argument("--json", type=Path, metavar="PATH", help="write the workload and its figures here")
    group.add_argument("--results", type=Path, metavar="FOLDER", help="write JSON and table here, named by the time")
    group.add_argument(
        "--plot", type=Path, nargs="?", const=_BESIDE_JSON, metavar="PATH", help="draw the run (beside the JSON)"
    )
    group.add_argument(
        "--sample-seconds", **_number(float, 1.0, "X", "with --plot: how often the server's counters are read")
    )


def _number(kind: type[int] | type[float], default: float, metavar: str, text: str) -> dict[str, Any]:
    return {"type": kind, "default": default, "metavar": metavar, "help": f"{text} (default {default:g})"}
