"""Engines that serve hand-made adapters with extras of every kind, and what their requests are to give."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from server.engine.base_model import BaseModel, load_base_model
from tests.adapters.drawn_extras import KINDS, Draw, oracle, parts_of
from tests.equivalence import harness as harnesses
from tests.equivalence import oracle as peft_oracle
from tests.equivalence.architectures import CONFIGS, build
from tests.equivalence.harness import EngineHarness, Squeeze

SIZE = {
    "vocab_size": 128, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
    "num_key_value_heads": 4, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
HEAD_MAJOR: dict[str, Any] = {  # norms of queries in heads, after these were put before the tokens
    "phi": lambda: hf.PhiConfig(**SIZE, qk_layernorm=True),
    "gemma3": lambda: hf.Gemma3TextConfig(**{**SIZE, "num_key_value_heads": 2}, head_dim=16, sliding_window=8),
    "cohere": lambda: hf.CohereConfig(**SIZE, use_qk_norm=True, logit_scale=0.5),
}
CHUNKS = Squeeze(max_num_batched_tokens=9, max_num_seqs=20, block_size=4)


@pytest.fixture(name="known_parts")
def known_parts_of_every_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """The base's parts as these tests name them."""

    def load(*args: Any) -> BaseModel:
        base = load_base_model(*args)
        parts = parts_of(base.model)
        found = replace(base.modules, norms=parts.norms, embedding=parts.embedding, head=parts.head)
        return replace(base, modules=found)

    monkeypatch.setattr(harnesses, "load_base_model", load)
    for name, config in HEAD_MAJOR.items():
        monkeypatch.setitem(CONFIGS, name, config)


def saved(architecture: str, folder: Path) -> Path:
    model = build(architecture).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name:
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3
    model.save_pretrained(folder)
    return folder


def prompt(number: int) -> list[int]:
    length = 1 + 7 * number % 23
    return torch.randint(0, 120, (length,), generator=torch.Generator().manual_seed(number)).tolist()


Uses = Sequence[tuple[str, float]]


def draw_all(folder: Path, dtype: torch.dtype, kinds: Sequence[str]) -> tuple[nn.Module, dict[str, Any]]:
    """The stock model and one adapter of each kind."""
    stock = peft_oracle.fresh_base(folder, dtype).requires_grad_(False)
    base = parts_of(stock)
    return stock, {kind: KINDS[kind](Draw(stock, base, list(KINDS).index(kind))) for kind in kinds}


def serve(
    folder: Path, dtype: str, adapters: dict[str, Any], requests: dict[str, Uses], squeeze: Squeeze, **options: Any
) -> EngineHarness:
    """Four at first, and one more every other step, so that prompts are cut at many places."""
    harness = EngineHarness.open(folder, dtype, squeeze, **options)
    for adapter in adapters.values():
        harness.engine.load_adapter(adapter)
    for number, (name, uses) in enumerate(requests.items()):
        found = [harness.use(adapters[kind].version, weight) for kind, weight in uses]
        number = sum(map(ord, name))  # the same whoever is served beside it
        harness.add(name, prompt(number), *sorted(found, key=lambda use: use.version), max_tokens=6 + number % 5)
        if len(harness.requests) >= 4:
            harness.engine_step()
            harness.engine_step()
    harness.run()
    return harness


def wanted(stock: nn.Module, adapters: dict[str, Any], uses: Uses, harness: EngineHarness, name: str) -> Tensor:
    """Logits [num_output_tokens, columns] of one forward pass over the prompt and what was sampled."""
    base = parts_of(stock)
    model: Any = oracle(stock, base, [(adapters[kind], weight) for kind, weight in uses]) if uses else stock
    ids = [*harness.requests[name].prompt_token_ids, *harness.tokens(name)]
    with torch.inference_mode():
        out: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return out[len(harness.requests[name].prompt_token_ids) - 1 : -1]


def chosen(harness: EngineHarness, name: str) -> Tensor:
    """[num_output_tokens, columns]: those that all its steps have, since one with a wider row beside it has more."""
    rows = [harness.logits[name][i] for i in range(len(harness.logits[name]))]
    return torch.stack([row[: min(map(len, rows))] for row in rows])


ONES: dict[str, Uses] = {kind: [(kind, 1.0)] for kind in KINDS}
