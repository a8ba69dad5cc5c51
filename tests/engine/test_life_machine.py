"""Loads, replaces, unloads, requests, cancellations, evictions, preemptions and restarts in any order.

Host memory holds four of six versions, the pools two or three, the KV cache too few blocks for everybody. Whatever
happens, each request gives the tokens its version gives alone, ends once, and leaves nothing behind.

The suite runs a few hundred steps; `LORAMUX_LIFE_STEPS=100000` (`make life`) runs as many as it says.
"""

import itertools
import os
from collections import Counter
from collections.abc import Callable
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.engine.life_world import MAX_TOKENS, RANKS, LifeWorld, Shelf
from tests.faults import plants

NAMES = ("sql", "chat", "poet", "law")
STEPS = int(os.environ.get("LORAMUX_LIFE_STEPS", "500"))
STEPS_PER_LIFE, LIVES_PER_SEED = 50, 12

names, versions, prompts = st.sampled_from(NAMES), st.integers(0, len(RANKS) - 1), st.integers(0, 3)


class LifeMachine(RuleBasedStateMachine):
    shelf: ClassVar[Shelf]
    seen: ClassVar[Counter[str]]

    @initialize(first=st.lists(versions, min_size=2, max_size=4), num_blocks=st.integers(12, 22))
    def begin(self, first: list[int], num_blocks: int) -> None:
        self.world = LifeWorld(self.shelf, host_room=4, device_rows=16, num_blocks=num_blocks, max_bypassed_steps=8)
        self.age = 0  # steps since the last start: much must have happened before a restart is worth its time
        for name, which in zip(NAMES, first, strict=False):
            self.world.load(name, which)

    @rule(wanted=st.lists(st.tuples(names, versions), min_size=1, max_size=4))
    def load_or_replace(self, wanted: list[tuple[str, int]]) -> None:
        self.count("loads", len(wanted))
        for name, which in wanted:
            self.world.load(name, which)

    @precondition(lambda self: len(self.world.registry))
    @rule(data=st.data())
    def unload(self, data: st.DataObject) -> None:
        self.count("unloads")
        self.world.unload(data.draw(st.sampled_from([n for n in NAMES if n in self.world.registry])))

    @rule(name=st.one_of(st.none(), names, names), prompt=prompts, max_tokens=st.integers(1, MAX_TOKENS))
    def infer(self, name: str | None, prompt: int, max_tokens: int) -> None:
        self.count("requests")
        self.world.ask(name, prompt, max_tokens=max_tokens)

    @rule(prompt=prompts)
    def infer_until_somebody_is_preempted(self, prompt: int) -> None:
        """One long request for every name at once is more than the KV cache holds."""
        self.count("bursts")
        for name in NAMES:
            self.world.ask(name, prompt)
        before = self.world.seen["preempted"]
        for _ in range(MAX_TOKENS):
            if self.world.seen["preempted"] > before:
                break
            self.world.step()

    @rule(times=st.integers(1, 6))
    def step(self, times: int) -> None:
        self.count("steps of the engine", times)
        for _ in range(times):
            self.world.step()

    @precondition(lambda self: self.world.live)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.count("cancels")
        self.world.cancel(data.draw(st.sampled_from(sorted(self.world.live))))

    @precondition(lambda self: self.idle_versions())
    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        self.count("evictions")
        self.world.evict(data.draw(st.sampled_from(self.idle_versions())))

    @precondition(lambda self: self.age >= STEPS_PER_LIFE // 3)
    @rule()
    def restart(self) -> None:
        self.age = 0
        self.count("restarts")
        self.world.restart()

    @invariant()
    def is_sound(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.run()
            self.seen.update(self.world.seen)

    def idle_versions(self) -> list[str]:
        host = self.world.engine.adapters.host
        return sorted(i.ref.version for i in self.world.registry.list() if not i.leases and i.ref.version in host)

    def count(self, event: str, times: int = 1) -> None:
        self.seen["steps"] += 1
        self.age += 1
        self.seen[event] += times


def run(shelf: Shelf, steps: int) -> Counter[str]:
    """Lives of at most STEPS_PER_LIFE steps until `steps` are done; what they went through.

    A few lives at a time, each time from the next seed: a longer run begins as a shorter one does, and repeats nothing.
    """
    seen: Counter[str] = Counter()
    limits = settings(
        max_examples=LIVES_PER_SEED,
        stateful_step_count=STEPS_PER_LIFE,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    for number in itertools.count():
        if seen["steps"] >= steps:
            break
        machine = type(f"Life{number}", (LifeMachine,), {"shelf": shelf, "seen": seen})
        run_state_machine_as_test(seed(number)(machine), settings=limits)
        if number % 20 == 19:
            print(f"{seen['steps']} steps, 0 violations", flush=True)
    return seen


def test_every_life_is_sound(life_shelf: Shelf) -> None:
    seen = run(life_shelf, STEPS)
    print(f"life machine: 0 violations; {', '.join(f'{count} {event}' for event, count in seen.most_common())}")
    must = "replaced in flight, unloaded in flight, evicted from host, evicted from device, preempted, prefix hits"
    rare = [event for event in [*must.split(", "), "restarted", "cancelled", "not found", "ended"] if seen[event] < 3]
    assert not rare, f"hardly happened: {rare} in {seen}"


@pytest.mark.parametrize(
    "plant", [plants.prefix_cache_without_adapters, plants.memoised_row_ranges, plants.unload_ignores_leases]
)
def test_the_machine_can_fail(life_shelf: Shelf, plant: Callable[[pytest.MonkeyPatch], None]) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises((AssertionError, KeyError, RuntimeError, ExceptionGroup)):
        plant(patch)
        run(life_shelf, 1000)
