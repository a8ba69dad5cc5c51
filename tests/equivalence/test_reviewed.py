"""What two readers found when all tests had passed: combinations that were served otherwise than they were trained."""

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from adapters.adapter_facts import check_device_room, facts_of
from adapters.adapter_ref import AdapterUse
from adapters.base_parts import EmbeddingShape, ExpertsShape, HeadShape, NormShape
from adapters.checkpoint import load_lora_model
from adapters.errors import AdapterCapacity, AdapterRefused
from adapters.lora_layers import LoRALayers
from adapters.lora_model import LoRAModel
from adapters.version_store import base_key
from server.config import ModelConfig
from server.engine.base_model import load_base_model
from tests.equivalence import oracle
from tests.equivalence.architectures import VOCAB, save
from tests.equivalence.harness import LIMITS, EngineHarness, Squeeze
from tests.server.fakes import TINY_BASE


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("base"))


def trained(base: Path, out: Path, *, resize: int = 0, **config: Any) -> Path:
    model = oracle.fresh_base(base, torch.float32)
    if resize:
        model.resize_token_embeddings(VOCAB + resize, mean_resizing=False)  # type: ignore[operator]
    peft_model = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "target_modules": ["q_proj"], **config})
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    peft_model.save_pretrained(out, save_embedding_layers=bool(resize))
    return out


def load(harness: EngineHarness, folder: Path) -> LoRAModel:
    base = harness.engine.base
    model = load_lora_model(folder, base.modules, limits=LIMITS, dtype=torch.float32, weights=base.weights).model
    harness.engine.load_adapter(model)
    return model


@pytest.mark.parametrize(
    "config",
    [
        {"modules_to_save": ["input_layernorm"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [5, 6]},
        {"resize": 5},
    ],
    ids=str,
)
def test_an_activated_adapter_that_changes_more_is_refused(base: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    """PEFT applies the rest to every token, invoked or not."""
    folder = trained(base, tmp_path, alora_invocation_tokens=[3, 4], **config)
    with pytest.raises(AdapterRefused, match="is activated at tokens of the prompt") as caught:
        load(EngineHarness.open(base, "float32", Squeeze()), folder)
    assert caught.value.feature == "alora_invocation_tokens"


def test_new_tokens_with_a_weight_have_nothing_of_another_token(base: Path, tmp_path: Path) -> None:
    """The base has no row for a token of the adapter's: half of it is half of the adapter's row."""
    folder = trained(base, tmp_path, resize=5)

    def logits(*, other_row_0: bool) -> torch.Tensor:
        harness = EngineHarness.open(base, "float32", Squeeze())
        model = load(harness, folder)
        if other_row_0:
            with torch.no_grad():
                harness.engine.base.model.get_input_embeddings().weight[0] += 1.0
        use = AdapterUse(model.version, 0.5)
        harness.add("r", [5, VOCAB + 1, 9], use, num_token_ids=VOCAB + 5, max_tokens=1)
        harness.run()
        return harness.logits["r"][0]

    assert torch.equal(logits(other_row_0=False)[1:], logits(other_row_0=True)[1:])


def test_room_is_judged_by_the_rows_that_are_taken(base: Path, tmp_path: Path) -> None:
    modules = load_base_model(base, "x", ModelConfig(dtype="float32", device="cpu")).modules
    room = 8 * LoRALayers.bytes_per_row(modules, torch.float32)
    harness = EngineHarness.open(base, "float32", Squeeze(lora_memory=room))
    layers = harness.engine.adapters.layers
    wide = load(
        harness, trained(base, tmp_path / "w", r=2, target_modules=["q_proj", "lm_head"], rank_pattern={"lm_head": 16})
    )
    eight = load(harness, trained(base, tmp_path / "e", r=8))
    facts = {model.version: facts_of(model, layers.sizes.need_of(model)) for model in (wide, eight)}
    assert [facts[model.version].need.num_rows for model in (wide, eight)] == [2, 8]
    check_device_room([AdapterUse(wide.version)], facts, harness.engine.adapters.pool.room)
    harness.add("r", [1, 2, 3], AdapterUse(wide.version), max_tokens=3)
    harness.run()
    assert len(harness.tokens("r")) == 3
    with pytest.raises(AdapterCapacity, match="take 10 ranks together, and all pools hold 8"):
        check_device_room(
            [AdapterUse(wide.version), AdapterUse(eight.version)], facts, harness.engine.adapters.pool.room
        )


def test_a_vast_vocabulary_is_refused_without_listing_its_tokens(base: Path, tmp_path: Path) -> None:
    harness = EngineHarness.open(base, "float32", Squeeze())
    shape = harness.engine.base.modules.embedding
    assert shape is not None
    num_tokens = 1 << 24
    pair = {"lora_embedding_A": torch.zeros(1, num_tokens).bfloat16(), "lora_embedding_B": torch.ones(shape.width, 1)}
    tensors = {f"base_model.model.{shape.name}.{name}": tensor for name, tensor in pair.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["embed_tokens"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    del tensors, pair
    tracemalloc.start()
    try:
        with pytest.raises(AdapterRefused, match=f"has {num_tokens} tokens"):
            load(harness, tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


def test_what_was_prepared_for_one_base_is_not_found_by_another() -> None:
    key = base_key(TINY_BASE, torch.float32)
    experts = ExpertsShape(4, 8, 4)
    others = [
        replace(TINY_BASE, embedding=EmbeddingShape("e", 100, 8)),
        replace(TINY_BASE, embedding=EmbeddingShape("e", 60, 8)),
        replace(TINY_BASE, head=HeadShape("h", 8, 100)),
        replace(TINY_BASE, head=HeadShape("h", 8, 100, is_tied=True)),
        replace(TINY_BASE, norms={"n": NormShape((8,))}),
        replace(TINY_BASE, experts={"x": experts}),
        replace(TINY_BASE, experts={"x": replace(experts, num_experts=8)}),
        replace(TINY_BASE, biased=frozenset({"model.layers.0.self_attn.q_proj"})),
    ]
    assert len({key, *(base_key(each, torch.float32) for each in others)}) == 1 + len(others)
