"""Adapters made on resized bases, rows of one batch beside base rows: PEFT's logits over each one's own vocabulary."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from adapters.checkpoint import load_lora_model
from server.engine.live_weights import LiveWeights
from tests.equivalence import oracle
from tests.equivalence.architectures import VOCAB, save
from tests.equivalence.harness import LIMITS, EngineHarness, Squeeze

SIZES = {"larger": VOCAB + 5, "largest": VOCAB + 9, "smaller": VOCAB - 24}
NUM_TOKENS = 12


def resized_adapter(base: Path, out: Path, size: int, seed: int) -> Path:
    model = oracle.fresh_base(base, torch.float32)
    model.resize_token_embeddings(size, mean_resizing=False)
    peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear"))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
        rows = peft.get_input_embeddings().weight
        rows[min(size, VOCAB) - 3 :] = torch.randn_like(rows[min(size, VOCAB) - 3 :]) * 0.3
    peft.save_pretrained(out, save_embedding_layers=True)
    return out


def resized_logits(base: Path, adapter: Path, size: int, token_ids: list[int]) -> Tensor:
    model = oracle.fresh_base(base, torch.float32)
    model.resize_token_embeddings(size, mean_resizing=False)
    model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.inference_mode():
        return model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0].float()


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("budget", [5, 64])
def test_rows_of_several_sizes(architecture: str, budget: int, tmp_path: Path) -> None:
    base = save(architecture, tmp_path / "base")
    squeeze = Squeeze(max_num_batched_tokens=budget, max_num_seqs=min(budget, 8), num_blocks=400)
    harness = EngineHarness.open(base, "float32", squeeze)
    prompts: dict[str, list[int]] = {"base": [5, 17, 99, 127, 31, 8]}
    harness.add("base", prompts["base"], max_tokens=NUM_TOKENS)
    folders = {}
    for seed, (name, size) in enumerate(SIZES.items()):
        folders[name] = resized_adapter(base, tmp_path / name, size, seed)
        modules, weights = harness.engine.base.modules, LiveWeights(lambda: harness.engine.base.model, "x")
        model = load_lora_model(folders[name], modules, limits=LIMITS, dtype=torch.float32, weights=weights).model
        assert model.extras.vocab_size == size
        harness.engine.load_adapter(model)
        prompts[name] = [5, size - 1, 17, min(size, VOCAB) - 1, size - 2, 31, 44]
        harness.add(name, prompts[name], model.version, num_token_ids=size, max_tokens=NUM_TOKENS)
    harness.run()
    for name, prompt in prompts.items():
        tokens, size = [*prompt, *harness.tokens(name)], SIZES.get(name, VOCAB)
        if name in folders:
            expected = resized_logits(base, folders[name], size, tokens)
        else:
            expected = oracle.logits(base, None, tokens, torch.float32)
        expected = expected[len(prompt) - 1 : -1]
        ours = torch.stack(
            [harness.logits[name][at][:size] for at in range(NUM_TOKENS)]
        )  # a step is as wide as its widest row
        assert expected.shape == ours.shape == (NUM_TOKENS, size)
        assert float((ours - expected).abs().max()) <= 1e-5 * float(expected.abs().max()), name
        assert harness.tokens(name) == expected.argmax(-1).tolist(), name
