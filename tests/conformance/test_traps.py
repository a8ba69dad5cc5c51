"""Traps that no cell of the table springs: norms that are 0 somewhere, capped logits of several vocabularies, and base
rows beside experts. The judges are PEFT and transformers.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from adapters.adapter_ref import AdapterVersion
from adapters.step_features import StepFeature
from tests.conformance.batch import BASE, prompt_of
from tests.conformance.making import lora
from tests.conformance.models import CONFIGS, VOCAB, fresh, save
from tests.conformance.oracle import PeftOracle, forward
from tests.conformance.training import move, train
from tests.conformance.traits import traits
from tests.equivalence.harness import EngineHarness, Squeeze

CHUNKS = Squeeze(max_num_seqs=16, max_num_batched_tokens=17)
ROOMY = Squeeze(max_num_seqs=16, max_num_batched_tokens=400)


def assert_row(harness: EngineHarness, name: str, model: nn.Module) -> Tensor:
    """Logits [num_output_tokens, vocab of `model`] of a row, after they were found to be the model's."""
    prompt = harness.requests[name].prompt_token_ids
    want = forward(model, [*prompt, *harness.tokens(name)])[len(prompt) - 1 : -1]
    got = torch.stack([harness.logits[name][i][: want.shape[1]] for i in range(len(want))])
    assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max()), name
    return want


# --- norms that give 0 in some channels: no correction of their output can bring those back


def nought(architecture: str) -> nn.Module:
    """Every norm gives 0, or its bias, in two channels; Gemma's weights are off by 1."""
    model = fresh(architecture)
    for name in traits(architecture).norms:
        model.get_parameter(f"{name}.weight")[[3, 7]] = -1.0 if architecture.startswith("gemma") else 0.0
    return model


def tuned(architecture: str, targets: Sequence[str], folder: Path) -> Path:
    config = LNTuningConfig(task_type="CAUSAL_LM", target_modules=list(targets))
    model: Any = get_peft_model(nought(architecture), config)  # type: ignore[arg-type]
    move(model, seed=1)
    model.save_pretrained(folder)
    return folder


def whole(architecture: str, folder: Path) -> Any:
    return PeftModel.from_pretrained(nought(architecture), folder).merge_and_unload().eval()  # type: ignore[arg-type]


def halfway(architecture: str, folder: Path) -> nn.Module:
    """A norm is linear in its parameters, so half an adapter is a norm with half the change."""
    model, adapted = nought(architecture), whole(architecture, folder)
    for name, parameter in model.named_parameters():
        parameter.lerp_(adapted.get_parameter(name), 0.5)
    return model


def features_of(harness: EngineHarness, version: AdapterVersion) -> StepFeature:
    ((start, _),) = harness.engine.adapters.row_ranges((harness.use(version),))
    return harness.engine.adapters.layers.extras.features_at(start)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen3", "gpt_neox"])
def test_a_replaced_norm_that_was_nought_somewhere_is_pefts(architecture: str, tmp_path: Path) -> None:
    nought(architecture).save_pretrained(tmp_path / "base")  # type: ignore[operator]
    targets = {"every": traits(architecture).norms, "last": traits(architecture).norms[-1:]}
    folders = {name: tuned(architecture, norms, tmp_path / name) for name, norms in targets.items()}
    harness = EngineHarness.open(tmp_path / "base", "float32", CHUNKS)
    versions = {name: harness.load(folder) for name, folder in folders.items()}
    harness.add(BASE, prompt_of(BASE), max_tokens=12)
    harness.add("half", prompt_of("half"), harness.use(versions["every"], 0.5), max_tokens=12)
    for name, version in versions.items():
        harness.add(name, prompt_of(name), version, max_tokens=12)
    harness.run()
    assert all(StepFeature.EXACT_NORM in features_of(harness, version) for version in versions.values())
    stock = nought(architecture)
    assert_row(harness, BASE, stock)
    judges = {name: whole(architecture, folder) for name, folder in folders.items()}
    for name, judge in {**judges, "half": halfway(architecture, folders["every"])}.items():
        assert_row(harness, name, judge)
        effect = forward(judge, prompt_of(name)) - forward(stock, prompt_of(name))
        assert float(effect.abs().max()) > 1e-2, f"{name} does nothing"


# --- tanh caps the logits after the head: a column that a row does not have must not come back as -cap, or as 0

SIZES = {"grown": VOCAB + 4, "shrunk": VOCAB - 4}
HOT = 1000.0  # temperature: any column that is left over would be drawn


def test_capped_logits_of_several_vocabularies_keep_apart(tmp_path: Path) -> None:
    cap: float = CONFIGS["gemma2"]().final_logit_softcapping
    harness = EngineHarness.open(save("gemma2", tmp_path / "base"), "float32", ROOMY)
    judges: dict[str, Any] = {BASE: fresh("gemma2")}
    uses: dict[str, dict[str, Any]] = {BASE: {}}
    for seed, (name, size) in enumerate(SIZES.items()):
        folder = train("gemma2", lora(traits("gemma2")), tmp_path / name, seed=seed, vocab_size=size)
        judges[name] = PeftOracle("gemma2", folder, size).model
        uses[name] = {"adapters": harness.load(folder), "num_token_ids": size}
    for name, use in uses.items():
        own = [use.pop("adapters")] if "adapters" in use else []
        for at in range(5):
            sampling = {"temperature": HOT if at else 0.0, "seed": at, "logprobs": 3, "max_tokens": 40}
            harness.add(f"{name} {at}", prompt_of(name)[: 5 + at], *own, **use, **sampling)
    harness.run()
    for name, judge in judges.items():
        size, drawn = SIZES.get(name, VOCAB), set()
        for at in range(5):
            row = f"{name} {at}"
            want = assert_row(harness, row, judge)
            assert want.shape[1] == size and float(want.abs().max()) <= cap
            tokens = harness.tokens(row)
            drawn |= set(tokens)
            if at == 0:
                assert tokens == want.argmax(-1).tolist()
            expected = want.log_softmax(-1)[range(len(tokens)), tokens]
            found = [logprob for output in harness.outputs[row] for logprob in output.logprobs or ()]
            assert [each.logprob for each in found] == pytest.approx(expected.tolist(), abs=1e-4), row
        assert drawn <= set(range(size)) and drawn & set(range(size - 4, size)), name


# --- experts multiply the tokens of all rows in groups: with the same tokens in them, a base row has the same bits


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_a_base_row_beside_experts_keeps_its_bits_where_others_route_alike(architecture: str, tmp_path: Path) -> None:
    """Adapters on the head alone, and the same tokens for every row by a bias: so every token goes where it went."""
    config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules=[traits(architecture).last_head])
    folder = train(architecture, config, tmp_path / "head", seed=3)
    rows: dict[bool, EngineHarness] = {}
    for is_adapted in (True, False):
        harness = rows[is_adapted] = EngineHarness.open(save(architecture, tmp_path / "base"), "float32", ROOMY)
        version = harness.load(folder)
        for name in (BASE, "a", "b", "c"):
            uses = [version] if is_adapted and name != BASE else []
            harness.add(name, prompt_of(name), *uses, max_tokens=10, logit_bias={len(name) + 5: 1e4})
        harness.run()
    beside, alone = rows[True], rows[False]
    assert beside.tokens("a") == alone.tokens("a")
    assert torch.equal(beside.chosen_logits(BASE), alone.chosen_logits(BASE))
    assert float((beside.chosen_logits("a") - alone.chosen_logits("a")).abs().max()) > 1e-2, "the adapter does nothing"
