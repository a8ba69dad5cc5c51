"""A mixed batch gives every row what PEFT gives that adapter alone on a fresh model.

Base rows, ranks 4, 8 and 64 and two requests of one adapter run together through chunked prefill, decode, preemption
and prefix hits. Greedy equality is shown by induction: if at every position the oracle, given our tokens so far,
would pick the token we picked, then its own greedy run is ours.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.equivalence import oracle
from tests.equivalence.architectures import CONFIGS, VOCAB, save
from tests.equivalence.harness import EngineHarness, Squeeze

Check = Callable[[EngineHarness, "dict[str, Case]", Path, dict[str, Path]], None]
RANKS = {"r4": 4, "r8": 8, "r64": 64}
NUM_TOKENS = 64


@dataclass(frozen=True)
class Case:
    """One row of the mixed batch: its prompt and the adapter that serves it (None = base)."""

    prompt: tuple[int, ...]
    adapter: str | None


def prompts(vocab: int, longer: int = 1) -> dict[str, Case]:
    """`longer` times the tokens; neighbours of one adapter then make runs long enough for matrix products."""
    generator = torch.Generator().manual_seed(7)

    def draw(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, vocab, (n * longer,), generator=generator).tolist())

    shared = draw(21)
    return {
        "base": Case(draw(17), None),
        "r4": Case(draw(30), "r4"),
        "r8": Case(shared + draw(3), "r8"),
        "r8-again": Case(shared + draw(9), "r8"),
        "r64": Case(draw(5), "r64"),
        "base-shared": Case(shared + draw(2), None),
    }


def make_adapters(base: Path, out: Path, std: float = 0.05) -> dict[str, Path]:
    return {
        name: oracle.make_adapter(
            base, out / name, seed=rank, std=std, r=rank, lora_alpha=2 * rank, target_modules="all-linear"
        )
        for name, rank in RANKS.items()
    }


def serve(harness: EngineHarness, cases: dict[str, Case], adapters: dict[str, Path]) -> None:
    """All cases in one batch; the second of two requests with one prefix comes later, so that it can hit."""
    versions = {name: harness.load(folder) for name, folder in adapters.items()}

    def add(name: str) -> None:
        case = cases[name]
        uses = () if case.adapter is None else (versions[case.adapter],)
        harness.add(name, case.prompt, *uses, max_tokens=NUM_TOKENS)

    late = [name for name in cases if name.endswith("-again")]
    for name in cases:
        if name not in late:
            add(name)
    for _ in range(8):  # far enough for the shared prompt to be cached, while everything still runs
        harness.engine_step()
    for name in late:
        add(name)
    harness.run()


def compare(
    harness: EngineHarness, cases: dict[str, Case], base: Path, adapters: dict[str, Path]
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Per case: our logits, the oracle's and the base's at every output position, all float32 [tokens, vocab]."""
    found = {}
    for name, case in cases.items():
        tokens = [*case.prompt, *harness.tokens(name)]
        window = slice(len(case.prompt) - 1, len(tokens) - 1)
        adapter = adapters.get(case.adapter) if case.adapter else None
        expected = oracle.logits(base, adapter, tokens, torch.float32)[window]
        plain = oracle.logits(base, None, tokens, torch.float32)[window]
        found[name] = (harness.chosen_logits(name), expected, plain)
    return found


def check_float32(harness: EngineHarness, cases: dict[str, Case], base: Path, adapters: dict[str, Path]) -> None:
    """Every row within 1e-5 of the largest logit and greedy-equal, adapters that matter, the hard paths taken."""
    for name, (ours, expected, plain) in compare(harness, cases, base, adapters).items():
        scale = float(expected.abs().max())
        assert float((ours - expected).abs().max()) <= 1e-5 * scale, name
        assert harness.tokens(name) == expected.argmax(-1).tolist(), name
        assert len(harness.tokens(name)) == NUM_TOKENS
        if cases[name].adapter:
            assert float((expected - plain).abs().max()) > 0.05 * scale, f"{name}: the adapter does nothing"
    check_hard_paths(harness)


def check_bfloat16(harness: EngineHarness, cases: dict[str, Case], base: Path, adapters: dict[str, Path]) -> None:
    """Every row's error against float32 is within twice that of PEFT in bfloat16, on the tokens we chose."""
    for name, (ours, exact, plain) in compare(harness, cases, base, adapters).items():
        case = cases[name]
        tokens = [*case.prompt, *harness.tokens(name)]
        adapter = adapters.get(case.adapter) if case.adapter else None
        peft = oracle.logits(base, adapter, tokens, torch.bfloat16)[len(case.prompt) - 1 : -1]
        error, allowed, effect = (ours - exact), (peft - exact), (exact - plain)
        assert float(error.square().mean().sqrt()) <= 2 * float(allowed.square().mean().sqrt()), name
        assert float(error.abs().max()) <= 2 * float(allowed.abs().max()), name
        if case.adapter:
            assert float(effect.square().mean()) > 4 * float(error.square().mean()), f"{name}: the adapter does nothing"
    check_hard_paths(harness)


def check_hard_paths(harness: EngineHarness) -> None:
    stats = harness.engine.stats()
    assert stats.num_preemptions > 0, "nothing was preempted: the test is too roomy"
    assert stats.prefix_hits > 0, "nothing came from the prefix cache"
    assert harness.max_step_adapters == len(RANKS), "the adapters never met in one step"


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_row_equals_peft_alone(architecture: str, tmp_path: Path) -> None:
    base = save(architecture, tmp_path / architecture)
    adapters = make_adapters(base, tmp_path / "adapters")
    harness = EngineHarness.open(base, "float32", Squeeze(num_blocks=80))
    cases = prompts(VOCAB)
    serve(harness, cases, adapters)
    check_float32(harness, cases, base, adapters)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_bfloat16_is_as_exact_as_peft_in_bfloat16(architecture: str, tmp_path: Path) -> None:
    base = save(architecture, tmp_path / architecture)
    adapters = make_adapters(base, tmp_path / "adapters")
    harness = EngineHarness.open(base, "bfloat16", Squeeze(num_blocks=80))
    cases = prompts(VOCAB)
    serve(harness, cases, adapters)
    check_bfloat16(harness, cases, base, adapters)


@pytest.mark.parametrize(("dtype", "check"), [("float32", check_float32), ("bfloat16", check_bfloat16)])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_long_runs_of_one_adapter(architecture: str, dtype: str, check: Check, tmp_path: Path) -> None:
    """Prompts long enough that LoRA goes through matrix products over segments, beside decode rows."""
    base = save(architecture, tmp_path / architecture)
    adapters = make_adapters(base, tmp_path / "adapters")
    squeeze = Squeeze(num_blocks=36, block_size=16, max_num_batched_tokens=160)
    harness = EngineHarness.open(base, dtype, squeeze)
    cases = prompts(VOCAB, longer=5)
    serve(harness, cases, adapters)
    assert harness.num_segments > 3
    check(harness, cases, base, adapters)


@pytest.mark.parametrize(("dtype", "check"), [("float32", check_float32), ("bfloat16", check_bfloat16)])
def test_the_default_model(dtype: str, check: Check, default_model_folder: Path, tmp_path: Path) -> None:
    adapters = make_adapters(default_model_folder, tmp_path / "adapters", std=0.03)
    harness = EngineHarness.open(default_model_folder, dtype, Squeeze(num_blocks=80, lora_memory=256 << 20))
    cases = prompts(vocab=49_000)
    serve(harness, cases, adapters)
    check(harness, cases, default_model_folder, adapters)


def test_a_seed_draws_the_same_tokens_alone_and_in_company(default_model_folder: Path, tmp_path: Path) -> None:
    """In bfloat16, on the real model: one request by itself, and beside others of other adapters, bit for bit."""
    adapters = make_adapters(default_model_folder, tmp_path / "adapters", std=0.03)
    harness = EngineHarness.open(default_model_folder, "bfloat16", Squeeze(lora_memory=256 << 20, block_size=16))
    versions = {name: harness.load(folder) for name, folder in adapters.items()}
    prompt = tuple(range(1000, 1012))

    def add(name: str, seed: int, adapter: str | None) -> None:
        uses = [versions[adapter]] if adapter else []
        harness.add(name, prompt, *uses, temperature=1.0, seed=seed, max_tokens=24)

    for name, adapter in (("alone-base", None), ("alone-r8", "r8")):
        add(name, 5, adapter)
        harness.run()
    for name, seed, adapter in (("base", 5, None), ("r8", 5, "r8"), ("x", 6, "r4"), ("y", 7, "r64"), ("z", 8, "r8")):
        add(name, seed, adapter)
    harness.run()
    for name in ("base", "r8"):
        assert harness.tokens(name) == harness.tokens(f"alone-{name}")
        assert torch.equal(harness.chosen_logits(name), harness.chosen_logits(f"alone-{name}"))
    assert len(set(harness.tokens("base"))) > 10 and harness.tokens("base") != harness.tokens("r8")
