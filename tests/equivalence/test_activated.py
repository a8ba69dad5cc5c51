"""aLoRA rows of a mixed batch against PEFT's, chunk borders anywhere; what stands before is shared with the base."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from adapters.adapter_extras import AdapterExtras
from adapters.adapter_ref import AdapterUse, AdapterVersion
from adapters.checkpoint import load_lora_model
from server.engine.invocation import begin_of
from tests.equivalence import oracle
from tests.equivalence.architectures import VOCAB, save
from tests.equivalence.harness import LIMITS, EngineHarness, Squeeze

INVOCATION = (7, 9)
NUM_TOKENS = 10


def activated_logits(base: Path, adapter: Path, token_ids: list[int], begin: int) -> Tensor:
    """Logits [num_tokens, vocab] by PEFT. The offset is given, as PEFT would search the generated tokens, too."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "alora_invocation_tokens": [*INVOCATION]}))
    model = PeftModel.from_pretrained(oracle.fresh_base(base, torch.float32), adapter).eval()
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with torch.inference_mode():
        ids = torch.tensor([token_ids])
        return model(input_ids=ids, use_cache=False, alora_offsets=[len(token_ids) - begin]).logits[0].float()


def load_activated(harness: EngineHarness, folder: Path) -> AdapterVersion:
    """A plain adapter's pairs as those of an aLoRA; a version of its own."""
    base = harness.engine.base
    model = load_lora_model(folder, base.modules, limits=LIMITS, dtype=base.dtype).model
    version = AdapterVersion(model.version[::-1])
    harness.engine.load_adapter(replace(model, version=version, extras=AdapterExtras(invocation_tokens=INVOCATION)))
    return version


def prompts() -> dict[str, list[int]]:
    drawn = torch.randint(10, VOCAB, (40,), generator=torch.Generator().manual_seed(3)).tolist()
    inv = [*INVOCATION]
    return {
        "middle": [*drawn[:13], *inv, *drawn[13:20]],
        "at the end": [*drawn[:21], *inv],
        "at once": [*inv, *drawn[:9]],
        "twice": [*drawn[:6], *inv, *drawn[6:17], *inv, *drawn[17:20]],
        "at a block's border": [*drawn[:8], *inv, *drawn[20:27]],
        "never": drawn[:15],
    }


@pytest.mark.parametrize(
    ("architecture", "budget"), [("llama", 1), ("llama", 3), ("llama", 5), ("llama", 64), ("gemma2", 5), ("gpt2", 16)]
)
def test_every_row_is_pefts(architecture: str, budget: int, tmp_path: Path) -> None:
    base = save(architecture, tmp_path / "base")
    folder = oracle.make_adapter(base, tmp_path / "a", seed=5, std=0.1, r=8, lora_alpha=16, target_modules="all-linear")
    harness = EngineHarness.open(
        base, "float32", Squeeze(max_num_batched_tokens=budget, max_num_seqs=min(budget, 8), num_blocks=400)
    )
    activated, plain = load_activated(harness, folder), harness.load(folder)
    for name, prompt in prompts().items():
        begin = begin_of(prompt, INVOCATION)
        harness.add(
            name, prompt, *(() if begin is None else (AdapterUse(activated, 1.0, begin),)), max_tokens=NUM_TOKENS
        )
    harness.add("base", prompts()["middle"], max_tokens=NUM_TOKENS)
    harness.add("plain", prompts()["middle"], plain, max_tokens=NUM_TOKENS)
    harness.run()
    for name, prompt in prompts().items():
        tokens, begin = [*prompt, *harness.tokens(name)], begin_of(prompt, INVOCATION)
        window = slice(len(prompt) - 1, len(tokens) - 1)
        without = oracle.logits(base, None, tokens, torch.float32)[window]
        whole = oracle.logits(base, folder, tokens, torch.float32)[window]
        expected = without if begin is None else activated_logits(base, folder, tokens, begin)[window]
        scale = float(expected.abs().max())
        assert float((harness.chosen_logits(name) - expected).abs().max()) <= 1e-5 * scale, name
        assert harness.tokens(name) == expected.argmax(-1).tolist(), name
        if begin is not None:
            assert float((expected - without).abs().max()) > 0.05 * scale, f"{name}: the adapter does nothing"
        if begin:
            assert float((expected - whole).abs().max()) > 1e-3 * scale, f"{name}: where it begins does not matter"
        if begin == 0:
            assert torch.allclose(expected, whole, atol=1e-5 * scale)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("first", ["base", "activated"])
def test_cached_blocks_change_no_bit(dtype: str, first: str, tmp_path: Path) -> None:
    """Alone on an empty cache, and after the other has left its blocks: the same logits, bit for bit."""
    base = save("llama", tmp_path / "base")
    folder = oracle.make_adapter(base, tmp_path / "a", seed=5, std=0.1, r=8, lora_alpha=16, target_modules="all-linear")
    prompt = prompts()["middle"]
    begin = begin_of(prompt, INVOCATION)
    assert begin == 13

    def run(*names: str) -> EngineHarness:
        harness = EngineHarness.open(base, dtype, Squeeze(num_blocks=100))
        use = AdapterUse(load_activated(harness, folder), 1.0, begin)
        for name in names:
            harness.add(name, prompt, *((use,) if name == "activated" else ()), max_tokens=8)
            harness.run()
        return harness

    second = "activated" if first == "base" else "base"
    alone, after = run(second), run(first, second)
    assert after.outputs[second][0].num_cached_tokens == 12  # three blocks of four
    assert torch.equal(alone.chosen_logits(second), after.chosen_logits(second))


def test_composed_with_a_plain_adapter(tmp_path: Path) -> None:
    """Before the invocation the plain one alone, after it both; by PEFT's numbers where each is alone."""
    base = save("llama", tmp_path / "base")
    folders = [
        oracle.make_adapter(
            base, tmp_path / str(seed), seed=seed, std=0.1, r=4, lora_alpha=8, target_modules="all-linear"
        )
        for seed in (1, 2)
    ]
    prompt = prompts()["at the end"]
    harness = EngineHarness.open(base, "float32", Squeeze(num_blocks=100, max_num_batched_tokens=7))
    plain, activated = harness.load(folders[0]), load_activated(harness, folders[1])
    at = begin_of(prompt, INVOCATION)
    assert at is not None
    uses = sorted([AdapterUse(plain, 0.5), AdapterUse(activated, 0.0, at)], key=lambda use: use.version)
    harness.add("half", prompt, AdapterUse(plain, 0.5), max_tokens=4)
    harness.add("nothing", prompt, *uses, max_tokens=4)
    harness.add("both", prompt, *(replace(use, weight=1.0) for use in uses), max_tokens=4)
    harness.run()
    assert torch.allclose(harness.chosen_logits("half"), harness.chosen_logits("nothing"), atol=1e-5)
    tokens = [*prompt, *harness.tokens("half")]
    expected = oracle.weighted_logits(base, [(folders[0], 0.5)], tokens)[len(prompt) - 1 : -1]
    assert torch.allclose(harness.chosen_logits("half"), expected, atol=1e-5 * float(expected.abs().max()))
    assert not torch.allclose(harness.chosen_logits("both")[0], harness.chosen_logits("half")[0], atol=1e-2)
