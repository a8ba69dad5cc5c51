"""Faults that other engines published, each as a check that ours passes and that the same fault, planted, fails.

A test is named after the issue that reported the fault. `check` says what must hold, on a real engine with a tiny
random model; `prove` runs it as it is, then again with the fault of tests/faults/plants.py in our code, and wants it
caught.
"""

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from adapters import run_plan
from adapters.applied_extras import AppliedExtras
from adapters.checkpoint import load_lora_model
from adapters.errors import AdapterRefused, RefusalCode
from adapters.lora_layers import LoRALayers
from adapters.lora_model import LoRAModel
from server.config import MIB, CacheConfig, EngineConfig, HTTPConfig, LoRALimits, ModelConfig, ServerConfig
from tests.adapters.hostile import PREFIX, Draft, draft
from tests.end_to_end.in_process import InProcessServer, free_port, in_process, save_tiny_model
from tests.engine.life_world import LifeWorld, Shelf
from tests.equivalence import oracle
from tests.equivalence.harness import LIMITS, EngineHarness
from tests.faults import plants

Plant = Callable[[pytest.MonkeyPatch], None]


def prove(check: Callable[[], None], plant: Plant, *, caught: type[Exception] = AssertionError, because: str) -> None:
    """`check` passes on our code; with the fault planted it fails, and for the reason expected."""
    check()
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        with pytest.raises(caught, match=because):
            check()


def longest(shelf: Shelf) -> int:
    """The prompt with the most full blocks to be found again."""
    return max(range(len(shelf.prompts)), key=lambda i: len(shelf.prompts[i]))


# Another adapter's tokens.


def test_vllm_47724_a_slot_is_evicted_while_its_rows_decode(life_shelf: Shelf) -> None:
    """As published: two decode, room for two, two more are loaded and asked for meanwhile."""

    def check() -> None:
        world = LifeWorld(life_shelf, device_rows=8)
        for name, which in (("a1", 0), ("a2", 2), ("a3", 5), ("a4", 1)):
            world.load(name, which)
        world.ask("a1", 0)
        world.ask("a2", 1)
        for i in range(8):
            world.step()
            world.ask(("a3", "a4")[i % 2], i % 4)
        world.run()
        assert world.seen["ended"] == 10

    prove(check, plants.slot_evicted_while_in_use, because="tokens of")


def test_vllm_47725_the_mapping_onto_slots_is_not_refreshed(life_shelf: Shelf) -> None:
    def check() -> None:
        world = LifeWorld(life_shelf, device_rows=16)
        for turn in range(3):
            for which in range(len(life_shelf.models)):
                world.load(f"a{which}", (which + turn) % len(life_shelf.models))
                world.ask(f"a{which}", which % 4, max_tokens=6)
            world.run()
        assert world.seen["evicted from device"] > 6, "nobody moved: nothing was proven"

    prove(check, plants.memoised_row_ranges, because="tokens of")


def test_ms_swift_10134_the_first_request_s_adapter_serves_the_batch(life_shelf: Shelf) -> None:
    def check() -> None:
        world = LifeWorld(life_shelf)
        for which in range(3):
            world.load(f"a{which}", which)
        for name in ("a0", "a1", "a2", None):
            world.ask(name, 0)
        world.run()
        assert max(map(len, world.step_versions)) == 4, "they never met in a batch"

    prove(check, plants.one_adapter_for_the_batch, because="tokens of")


def test_vllm_42125_a_replaced_name_finds_the_old_bytes_prefix(life_shelf: Shelf) -> None:
    """A → B → A under one name: each answers as after a cold start, and only the second A may find A's prefix."""

    def check() -> None:
        world, prompt, hits = LifeWorld(life_shelf), longest(life_shelf), []
        for which in (0, 1, 0):
            world.load("hot", which)
            world.ask("hot", prompt)
            world.run()
            hits.append(world.seen["prefix hits"])
        assert hits[0] == hits[1] == 0 < hits[2], f"prefix hits {hits}"

    names = {model.version: "hot" for model in life_shelf.models}
    prove(check, lambda patch: plants.prefix_cache_by_name(patch, names), because="tokens of|prefix hits")


def test_llama_cpp_26207_a_cached_prompt_serves_another_adapter(life_shelf: Shelf) -> None:
    def check() -> None:
        world, prompt = LifeWorld(life_shelf), longest(life_shelf)
        for which in (0, 1):
            world.load(f"a{which}", which)
        for name in (None, "a0", "a1", None, "a0"):
            world.ask(name, prompt)
            world.run()
        assert world.seen["prefix hits"] > 0, "nothing was ever found again: nothing is proven"

    prove(check, plants.prefix_cache_without_adapters, because="tokens of")


def test_vllm_31326_load_inplace_changes_requests_that_run(life_shelf: Shelf) -> None:
    def check() -> None:
        world = LifeWorld(life_shelf)
        world.load("hot", 0)
        before = world.ask("hot", 0)
        for _ in range(5):
            world.step()
        world.load("hot", 2)
        after = world.ask("hot", 0)
        world.run()
        assert before and after and world.tokens(before) != world.tokens(after)

    prove(check, plants.replacement_mutates_what_runs, because="tokens of")


# Loads and unloads under way.


def test_vllm_13698_unloading_while_it_generates_ends_the_server(life_shelf: Shelf) -> None:
    def check() -> None:
        world = LifeWorld(life_shelf)
        world.load("hot", 0)
        world.ask("hot", 0)
        world.ask(None, 1)
        for _ in range(4):
            world.step()
        world.unload("hot")
        world.load("other", 1)
        world.ask("other", 2)
        world.run()
        assert world.seen["ended"] == 3 and world.seen["unloaded in flight"] == 1

    prove(check, plants.unload_ignores_leases, caught=KeyError, because="is not loaded")


def test_sglang_unload_slips_between_lookup_and_count(life_shelf: Shelf) -> None:
    """What SGLang's registry was rewritten for: resolve a name, then count the use; an unload comes in between."""

    def check() -> None:
        world = LifeWorld(life_shelf)
        world.load("hot", 0)
        lease = world.registry.acquire("hot")
        world.unload("hot")
        world.ask_with(lease, 0)
        world.run()
        assert world.seen["ended"] == 1

    prove(check, plants.leases_counted_at_admission, caught=KeyError, because="is not loaded")


def test_vllm_33791_an_adapter_is_loaded_again_in_every_step(
    life_shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[str] = []
    write = LoRALayers.write

    def counting(self: LoRALayers, start: int, model: LoRAModel, extras: AppliedExtras | None = None) -> None:
        copies.append(model.version)
        write(self, start, model, extras)

    monkeypatch.setattr(LoRALayers, "write", counting)

    def check() -> None:
        copies.clear()
        world = LifeWorld(life_shelf)
        world.load("hot", 0)
        for prompt in (0, 1):
            world.ask("hot", prompt)
            world.run()
        assert len(copies) == 1, f"copied {len(copies)} times"

    prove(check, plants.pools_written_every_step, because=r"copied \d\d times")


def test_vllm_54839_unloading_frees_nothing(life_shelf: Shelf) -> None:
    def check() -> None:
        engine = LifeWorld(life_shelf).engine
        model = load_lora_model(life_shelf.folders[3], engine.base.modules, limits=LIMITS, dtype=torch.float32).model
        weights, version = weakref.ref(next(iter(model.modules.values())).lora_a), model.version
        engine.load_adapter(model)
        engine.adapters.begin_step()
        assert engine.adapters.pool.pin(version, model.lora_rank)
        engine.adapters.activate()
        del model
        engine.unload_adapter(version)
        gc.collect()
        assert engine.adapters.host.num_bytes == 0, "host memory still counts it"
        assert weights() is None, "its weights are still in memory"
        assert engine.adapters.pool.num_free_rows == engine.adapters.pool.num_rows, "it still holds rows"

    prove(check, plants.unload_frees_nothing, because="host memory still counts it")


def test_vllm_42633_unload_and_load_leave_two_copies(life_shelf: Shelf) -> None:
    def check() -> None:
        world = LifeWorld(life_shelf)
        world.load("hot", 0)
        world.unload("hot")
        world.load("hot", 1)
        world.load("hot", 2)
        world.check()
        assert len(world.engine.adapters.host) == 1

    prove(check, plants.nobody_hears_of_the_unused, because="was not freed")


# Who gets into a step.


def test_sglang_23141_a_base_row_counts_as_an_adapter(life_shelf: Shelf) -> None:
    """Two adapters, a limit of two adapters a step, and a base row: all three run together."""

    def check() -> None:
        world = LifeWorld(life_shelf, max_loras=2)
        for which in (0, 1):
            world.load(f"a{which}", which)
        for name in ("a0", "a1", None):
            world.ask(name, 0)
        world.run()
        assert max(map(len, world.step_versions)) == 3, "the base row had to wait"

    prove(check, plants.base_row_takes_a_slot, because="the base row had to wait")


def test_sglang_15129_a_b_a_a_a_starves_b(life_shelf: Shelf) -> None:
    def check() -> None:
        world = LifeWorld(life_shelf, device_rows=4, max_bypassed_steps=8)
        world.load("a", 0)
        world.load("b", 2)
        world.ask("a", 0)
        world.step()
        starved = world.ask("b", 1, max_tokens=4)
        for _ in range(150):
            if sum(each.version == life_shelf.models[0].version for each in world.live.values()) < 3:
                world.ask("a", 0)
            world.step()
        assert starved in world.ended, "b still waits"
        world.run()

    prove(check, plants.nobody_drains, because="b still waits")


# Weights that do not do what their files say.


def refusal(folder: Path, shelf: Shelf) -> RefusalCode | None:
    """Why the folder is refused; None when it loads."""
    modules = LifeWorld(shelf).engine.base.modules
    try:
        load_lora_model(folder, modules, limits=LIMITS, dtype=torch.float32)
    except AdapterRefused as error:
        return error.reason
    return None


def rewritten(shelf: Shelf, folder: Path, change: Callable[[Draft], None], *, r: int = 4) -> Path:
    """A sound adapter on three modules, changed."""
    made = draft(folder, LifeWorld(shelf).engine.base.modules, r=r)
    change(made)
    made.write()
    return folder


def test_vllm_34186_modules_that_match_nothing_are_left_out(life_shelf: Shelf, tmp_path: Path) -> None:
    def misplace(made: Draft) -> None:
        made.tensors = {name.replace(PREFIX, f"{PREFIX}nowhere."): each for name, each in made.tensors.items()}

    folder = rewritten(life_shelf, tmp_path / "a", misplace)

    def check() -> None:
        found = refusal(folder, life_shelf)
        assert found is RefusalCode.KEY_UNMATCHED, f"refused with {found}"

    prove(check, plants.unmatched_modules_are_dropped, because="refused with None")


def test_vllm_omni_6476_undersized_tensors_are_padded(life_shelf: Shelf, tmp_path: Path) -> None:
    def resize(half: str, by: int) -> Callable[[Draft], None]:
        def change(made: Draft) -> None:
            name = made.first_a if half == "a" else made.first_b
            rows, columns = made.tensors[name].shape
            shape = (rows, columns + by) if half == "a" else (rows + by, columns)
            made.tensors[name] = torch.ones(shape).numpy()

        return change

    folders = [
        rewritten(life_shelf, tmp_path / f"{half}{by}", resize(half, by)) for half in ("a", "b") for by in (-1, 1)
    ]

    def check() -> None:
        found = {folder.name: refusal(folder, life_shelf) for folder in folders}
        assert set(found.values()) == {RefusalCode.SHAPE_MISMATCH}, f"refused with {found}"

    prove(check, plants.undersized_tensors_are_padded, because="refused with .*'a-1': None")


def test_sglang_40835_rslora_is_served_too_weak(life_shelf: Shelf, tmp_path: Path) -> None:
    folder = oracle.make_adapter(
        life_shelf.model, tmp_path / "rs", seed=1, r=16, lora_alpha=16, use_rslora=True, target_modules="all-linear"
    )
    prompt = list(life_shelf.prompts[0])
    expected = oracle.logits(life_shelf.model, folder, prompt, torch.float32)[-1]

    def check() -> None:
        harness = EngineHarness.open(life_shelf.model, "float32")
        harness.add("one", prompt, harness.load(folder), max_tokens=1)
        harness.run()
        error = float((harness.chosen_logits("one")[0] - expected).abs().max() / expected.abs().max())
        assert error < 1e-4, f"PEFT's logits are {error:.0e} away"

    prove(check, plants.rslora_is_ignored, because="PEFT's logits are")


def test_gpustack_5438_a_rank_over_the_limit_goes_in(life_shelf: Shelf, tmp_path: Path) -> None:
    """Refused by what the header says: not a byte of the weights is read."""
    folder = rewritten(life_shelf, tmp_path / "wide", lambda _: None, r=LIMITS.max_lora_rank + 1)

    def check() -> None:
        reads: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            read = run_plan.read_piece
            patch.setattr(run_plan, "read_piece", lambda piece, *to: (reads.extend(piece.names), read(piece, *to))[1])
            found = refusal(folder, life_shelf)
        assert found is RefusalCode.TOO_LARGE and not reads, f"refused with {found} after {len(reads)} reads"

    prove(check, plants.ranks_are_not_limited, because="refused with None")


def test_vllm_11727_an_adapter_of_another_base_fails_the_step_it_is_in(life_shelf: Shelf, tmp_path: Path) -> None:
    def widen(made: Draft) -> None:
        for name, each in made.tensors.items():
            rows, columns = each.shape
            wider = (rows, columns + 16) if ".lora_A." in name else (rows + 16, columns)
            made.tensors[name] = torch.ones(wider).numpy()

    folder = rewritten(life_shelf, tmp_path / "other", widen)

    def check() -> None:
        found = refusal(folder, life_shelf)
        assert found is RefusalCode.WRONG_BASE, f"refused with {found}"

    prove(check, plants.bases_are_not_compared, because="refused with None")


# Through the front door.


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcessServer]:
    """A whole server whose base has a colon in one of its names."""
    model = save_tiny_model(tmp_path_factory.mktemp("served") / "model")
    config = ServerConfig(
        engine=EngineConfig(
            model=ModelConfig(model=str(model), dtype="float32", device="cpu"),
            cache=CacheConfig(kv_cache_memory=8 * MIB),
            lora=LoRALimits(lora_memory=8 * MIB),
        ),
        http=HTTPConfig(port=free_port()),
        served_model_names=("org/base", "org/base:latest"),
    )
    with in_process(config) as server:
        yield server


def complete(server: InProcessServer, model: str) -> httpx.Response:
    body = {"model": model, "prompt": "the quick brown", "max_tokens": 8, "temperature": 0, "return_token_ids": True}
    return httpx.post(f"{server.url}/v1/completions", json={**body, "ignore_eos": True}, timeout=60)


def load(server: InProcessServer, name: str, folder: Path) -> dict[str, Any]:
    body = {"name": name, "source": str(folder), "load_inplace": True}
    reply = httpx.post(f"{server.url}/v1/adapters?wait=30", json=body, timeout=60)
    assert reply.status_code in (200, 201), reply.text
    loaded: dict[str, Any] = reply.json()
    return loaded


def test_tgi_2505_an_unknown_adapter_is_answered_by_the_base(served: InProcessServer) -> None:
    def check() -> None:
        reply = complete(served, "nobody")
        assert reply.status_code == 404, f"answered with {reply.status_code}"

    prove(check, plants.unknown_names_are_the_base, because="answered with 200")


def test_sglang_12745_a_colon_in_the_base_s_name_means_an_adapter(served: InProcessServer) -> None:
    def check() -> None:
        reply = complete(served, "org/base:latest")
        assert reply.status_code == 200, f"answered with {reply.status_code}"
        assert reply.json()["choices"][0]["token_ids"] == complete(served, "org/base").json()["choices"][0]["token_ids"]

    prove(check, plants.what_follows_a_colon_is_an_adapter, because="answered with 404")


def test_vllm_48352_new_bytes_at_the_same_place_are_not_read(served: InProcessServer, tmp_path: Path) -> None:
    """Train, load, train on, load again from the same folder."""
    base = served.context.engine.info.base  # type: ignore[attr-defined]

    def check() -> None:
        answers, versions = [], []
        for seed in (1, 2):
            draft(tmp_path / "trained", base, seed=seed, num_modules=99).write()
            versions.append(load(served, "trained", tmp_path / "trained")["version"])
            reply = complete(served, "trained")
            assert reply.headers["x-loramux-adapter-version"] == versions[-1]
            answers.append(reply.json()["choices"][0]["token_ids"])
        assert versions[0] != versions[1], "the second load brought the first's bytes"
        assert answers[0] != answers[1]

    prove(check, plants.a_place_is_read_once, because="the second load brought the first's bytes")
    served.check_integrity()
