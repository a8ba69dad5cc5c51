"""A server killed at any moment loses nothing it acknowledged, and comes back with whole adapters and no litter.

`make restart-proof` does it 200 times. The same check must find planted faults, or it would prove nothing.
"""

import multiprocessing
import os
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from tests.server.lifecycle.restart_child import (
    FIXED,
    NUM_SEEDS,
    PLANTS,
    Move,
    Standing,
    serve_until_killed,
)
from tests.server.lifecycle.restart_world import adapter_folder

KILLS = int(os.environ.get("LORAMUX_RESTART_KILLS", "12"))
PLANT_KILLS = 60
PATIENCE = 900.0  # seconds; a machine may be stopped for a while


@dataclass
class Expected:
    """What the clients were told, and the move each may have been cut off in."""

    names: dict[str, Standing] = field(default_factory=dict)
    cut_off: dict[int, Move] = field(default_factory=dict)  # client → move
    counts: Counter[str] = field(default_factory=Counter)

    def hear(self, told: tuple[object, ...]) -> None:
        kind, client, move = told
        assert isinstance(client, int) and isinstance(move, Move)
        if kind == "tries":
            self.cut_off[client] = move
            return
        del self.cut_off[client]
        self.counts["acknowledged"] += 1
        _put(self.names, move.name, after(move, self.names.get(move.name)))

    def check(self, stands: dict[str, Standing]) -> None:
        """Every name is as it was acknowledged, or as the move that was cut off makes it."""
        stands = {name: standing for name, standing in stands.items() if name != FIXED}
        moves = {move.name: move for move in self.cut_off.values()}
        for name in {*stands, *self.names, *moves}:
            old, now = self.names.get(name), stands.get(name)
            allowed = [old, after(moves[name], old)] if name in moves else [old]
            assert now in allowed, f"{name} is {now}, and should be one of {allowed}; cut off: {moves.get(name)}"
            if name in moves:
                self.counts["cut off: " + ("done" if now == allowed[1] else "not done")] += 1
            _put(self.names, name, now)
        self.cut_off = {}


def after(move: Move, old: Standing | None) -> Standing | None:
    match move.action:
        case "load" | "submit":
            return Standing("adapter", move.number, move.seed)
        case "settings":
            assert old is not None
            return Standing("adapter", move.number, old.seed)
        case "alias":
            return Standing("alias", move.number)
    return None


def _put(names: dict[str, Standing], name: str, standing: Standing | None) -> None:
    if standing is None:
        names.pop(name, None)
    else:
        names[name] = standing


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.server.lifecycle.restart_child"])
    return context


def prove(folder: Path, processes: ForkServerContext, kills: int, plant: str = "") -> Counter[str]:
    """Start, check, and kill at a random moment, `kills` times; AssertionError as soon as something is not as told."""
    for seed in range(NUM_SEEDS):
        adapter_folder(folder / "sources", seed)
    chance, expected = random.Random(kills), Expected()
    for turn in range(kills + 1):
        ours, theirs = processes.Pipe(duplex=False)
        args = (folder / "state", folder / "sources", turn, theirs, plant)
        child = processes.Process(target=serve_until_killed, args=args)
        child.start()
        theirs.close()
        if turn < kills and chance.random() < 0.15:
            time.sleep(chance.uniform(0, 0.15))  # while it starts
        else:
            _check_start(ours, expected)
            time.sleep(chance.uniform(0, 0.4))
        child.kill()
        child.join(PATIENCE)
        _hear_the_rest(ours, expected)
        expected.counts["kills"] += 1
    return expected.counts


def _check_start(told: Connection, expected: Expected) -> None:
    stands = _next(told, "stands")
    settled = _next(told, "settled")
    expected.counts["loads that went on"] += sum(each.pending is not None for each in stands.values())
    expected.check(settled)


def _next(told: Connection, kind: str) -> dict[str, Standing]:
    assert told.poll(PATIENCE), "the server does not start"
    try:
        said, names = told.recv()
    except EOFError:
        raise AssertionError("the server found itself damaged, see its output") from None
    assert said == kind
    assert isinstance(names, dict)
    return names


def _hear_the_rest(told: Connection, expected: Expected) -> None:
    """Of a server that was killed while it started, what it found is of no matter: nobody was told."""
    while True:
        try:
            message = told.recv()
        except EOFError:
            return
        if message[0] == "settled":
            expected.check(message[1])
        elif message[0] != "stands":
            expected.hear(message)


def test_a_killed_server_loses_nothing(tmp_path: Path, processes: ForkServerContext) -> None:
    began = time.monotonic()
    counts = prove(tmp_path, processes, KILLS)
    print(f"\n{dict(counts)} in {time.monotonic() - began:.0f} s")
    assert counts["kills"] == KILLS + 1 and counts["acknowledged"] > KILLS


@pytest.mark.parametrize("plant", [plant for plant in PLANTS if plant])
def test_the_same_proof_finds_a_planted_fault(tmp_path: Path, processes: ForkServerContext, plant: str) -> None:
    with pytest.raises(AssertionError):
        prove(tmp_path, processes, PLANT_KILLS, plant)
