"""Ours beside vLLM, llama.cpp and PEFT in one run: the same base, adapters and prompts, in turns, as ratios.

Absolute figures move with the machine; so everything that is compared is measured within minutes, one server running
at a time, and what is quoted is the ratio of medians. Our side's mix is proven or the run fails.
"""

import asyncio
import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loadtest.peers_bytes import Bandwidth, StepBytes, measure_bandwidth
from loadtest.peers_cells import FEW_ADAPTERS, MANY_ADAPTERS, NUM_ADAPTERS, Cell, Load, Pair, output_tokens
from loadtest.peers_endpoints import OURS, PEERS, PEFT, Contender, Endpoint, Programs, Starter, find_programs
from loadtest.peers_requirements import ETA_ROWS, DecodeLimit, Requirement, decode_limit, requirements
from loadtest.peers_rounds import Results, measure_cells, measure_pairs
from loadtest.peers_table import Setting, page
from loadtest.peers_versions import versions_of
from loadtest.peers_weights import cached_weights, default_gguf
from loadtest.report import describe_machine

_QUIET_LOAD = 0.5  # the system's load average, above which somebody else is using the machine
_QUICK_MANY = 40  # adapters in place of MANY_ADAPTERS
_HOST_BYTES_PER_ADAPTER = 12 << 20  # what an adapter of rank 16 takes here, rounded up


@dataclass(frozen=True, slots=True, kw_only=True)
class PeersSettings:
    names: tuple[str, ...]  # contenders; ours among them
    missing: dict[str, str]  # peer → why it takes no part
    programs: Programs
    cells: tuple[Cell, ...]
    pairs: tuple[Pair, ...]
    rounds: int = 3
    quick: bool = False  # one round of short requests, no verdict
    results: Path = Path("bench-results")
    publish: Path | None = None


@dataclass(slots=True)
class Run:
    """What a run has found so far; written after every measurement, so that a late failure loses nothing."""

    settings: PeersSettings
    load_before: float
    when: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    results: Results = field(default_factory=Results)
    commands: dict[str, str] = field(default_factory=dict)
    bandwidth: Bandwidth | None = None

    def save(self, required: Sequence[Requirement] = ()) -> None:
        self.settings.results.mkdir(parents=True, exist_ok=True)
        record = self._record() | {"required": [asdict(each) | {"held": each.held} for each in required]}
        self.path.write_text(json.dumps(record, indent=2) + "\n")

    @property
    def path(self) -> Path:
        stamp = self.when.replace(":", "").replace("-", "").partition("+")[0]
        return self.settings.results / f"peers-{stamp}.json"

    def note(self, endpoint: Endpoint) -> None:
        self.commands[endpoint.name] = endpoint.command

    def _record(self) -> dict[str, Any]:
        measured = {"cells": self.results.cells, "pairs": self.results.pairs}
        return {
            "when": self.when,
            "command": command_line(),
            "machine": describe_machine(),
            "load_before": self.load_before,
            "bandwidth": None if self.bandwidth is None else asdict(self.bandwidth),
            "servers": self.commands,
            **{
                kind: {" ".join(key): [each.to_dict() for each in found] for key, found in by_key.items()}
                for kind, by_key in measured.items()
            },
        }


def peers(settings: PeersSettings) -> int:
    """Measure, print, write; 1 when something that must hold was missed, unless the run is a quick one."""
    find_programs(settings.names, settings.programs)
    run = Run(settings, os.getloadavg()[0])
    if run.load_before > _QUIET_LOAD:
        print(f"The machine is not idle (load {run.load_before:.1f}): nobody's figures will be good", flush=True)
    if settings.cells:
        _measure_cells(run)
    if settings.pairs:
        _measure_pairs(run)
    return conclude(run)


def _measure_cells(run: Run) -> None:
    settings = run.settings
    with ExitStack() as stack:
        starter = _starter(stack, settings)
        contenders = [_start(starter, name, settings.cells) for name in settings.names]
        for contender in contenders:
            for endpoint in (contender.for_adapters, contender.for_base):
                if endpoint is not None:
                    run.note(endpoint)
        rounds = measure_cells(
            contenders, settings.cells, run.results, rounds=settings.rounds, quick=settings.quick, save=run.save
        )
        asyncio.run(rounds)


def _start(starter: Starter, name: str, cells: Sequence[Cell]) -> Contender:
    asked = [cell for cell in cells if name != PEFT or cell.peft]
    adapters, base = any(cell.adapters for cell in asked), any(not cell.adapters for cell in asked)
    return starter.contender(name, NUM_ADAPTERS, adapters=adapters, base=base)


def _measure_pairs(run: Run) -> None:
    """Those of the server with many adapters apart: it fills memory."""
    settings = run.settings
    many = [pair for pair in settings.pairs if Load.MANY in _servers_of(pair)]
    for pairs in ([pair for pair in settings.pairs if pair not in many], many):
        if not pairs:
            continue
        with ExitStack() as stack:
            starter = _starter(stack, settings)
            wanted = {load for pair in pairs for load in _servers_of(pair)}
            servers = {load: _start_ours(starter, load, settings) for load in Load if load in wanted}
            for endpoint in servers.values():
                run.note(endpoint)
            run.bandwidth = run.bandwidth or measure_bandwidth()  # now, while everyone is held still
            rounds = measure_pairs(
                servers, pairs, run.results, rounds=settings.rounds, quick=settings.quick, save=run.save
            )
            asyncio.run(rounds)


def _servers_of(pair: Pair) -> set[Load]:
    return {pair.over.server, pair.under.server}


def _start_ours(starter: Starter, load: Load, settings: PeersSettings) -> Endpoint:
    """Default settings, but for room in host memory where the default cannot hold them all."""
    many = _QUICK_MANY if settings.quick else MANY_ADAPTERS
    num_adapters = {Load.LOADED: NUM_ADAPTERS, Load.BARE: 0, Load.FEW: FEW_ADAPTERS, Load.MANY: many}[load]
    flags = ["--cpu-lora-memory", str(num_adapters * _HOST_BYTES_PER_ADAPTER)] if load is Load.MANY else []
    return starter.ours(f"{OURS} {load}", num_adapters, *flags)


def _starter(stack: ExitStack, settings: PeersSettings) -> Starter:
    programs = find_programs(settings.names, settings.programs)
    return Starter(stack, settings.results, cached_weights(), programs)


def conclude(run: Run) -> int:
    """Print and write the page; the verdict is of what was measured."""
    settings, step_bytes = run.settings, StepBytes.of(default_gguf())
    found = (decode_limit(run.results, rows, step_bytes, run.bandwidth) for rows in ETA_ROWS)
    limits: list[DecodeLimit] = [each for each in found if each is not None]
    required: list[Requirement] = requirements(run.results, limits)
    run.save(required)
    setting = Setting(
        when=run.when,
        command=command_line(),
        machine=describe_machine(),
        load_before=run.load_before,
        rounds=settings.rounds,
        output_tokens=output_tokens(quick=settings.quick),
        versions=versions_of(settings.names, settings.programs),
        commands=run.commands,
        missing={name: why for name, why in settings.missing.items() if name in PEERS},
        bandwidth=run.bandwidth,
        step_bytes=step_bytes,
    )
    text = page(setting, run.results, settings.cells, settings.pairs, limits, required)
    print(f"\n{text}\nWritten to {run.path}")
    if settings.publish is not None:
        settings.publish.parent.mkdir(parents=True, exist_ok=True)
        settings.publish.write_text(text)
    missed = [each for each in required if each.held is False]
    if missed and not settings.quick:
        print(f"FAILED: {len(missed)} of what must hold was missed: {'; '.join(each.what for each in missed)}")
        return 1
    return 0


def command_line() -> str:
    """As it was typed, but for folders of this machine."""
    return "python -m loadtest " + " ".join(shlex.quote(re.sub(r"^/\S*/", "", each)) for each in sys.argv[1:])
