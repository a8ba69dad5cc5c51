"""The base's weights read back from a loaded model, however they lie there, and DoRA's gains against PEFT's own."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from adapters.base_weights import dora_gain, embedding_dora_gain
from adapters.whole_rows import compare
from server.config import ModelConfig
from server.engine.base_model import load_base_model
from server.engine.live_weights import LiveWeights, fingerprint


def llama(*, hidden_size: int = 64, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=hidden_size, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, attention_bias=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape).to(dtype)
    return model


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=32, n_embd=32, n_layer=1, n_head=2))


@pytest.mark.parametrize("hidden_size", [64, 60], ids=["panels", "other products"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_served_model_gives_back_what_was_loaded(tmp_path: Path, hidden_size: int, dtype: torch.dtype) -> None:
    plain = llama(hidden_size=hidden_size, dtype=dtype)
    plain.save_pretrained(tmp_path)
    weights = load_base_model(tmp_path, "tiny", ModelConfig()).weights
    for name, parameter in plain.named_parameters():
        assert weights.shape(name) == tuple(parameter.shape), name
        for begin, end in ((0, len(parameter)), (5, 41), (33, 34)):
            assert torch.equal(weights.rows(name, begin, end), parameter[begin:end].float()), (name, begin, end)
    assert weights.shape("model.nowhere.weight") is None
    with pytest.raises(KeyError, match=r"model\.norm\.bias"):
        weights.rows("model.norm.bias", 0, 1)


def test_a_transposed_linear_is_read_the_usual_way_round() -> None:
    model = gpt2()
    weights = LiveWeights(lambda: model, "")
    stored = model.transformer.h[0].attn.c_attn.weight  # [in, out]
    assert weights.shape("transformer.h.0.attn.c_attn.weight") == (96, 32)
    assert torch.equal(weights.rows("transformer.h.0.attn.c_attn.weight", 7, 50), stored[:, 7:50].T)


def test_what_is_read_is_a_copy() -> None:
    model = llama(dtype=torch.float32)
    weights = LiveWeights(lambda: model, "")
    weights.rows("model.norm.weight", 0, 64).zero_()
    assert model.model.norm.weight.abs().min() > 0


def test_other_weights_have_another_fingerprint(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "same")
    model.model.layers[1].mlp.down_proj.weight.data[3, 3] += 1
    model.save_pretrained(tmp_path / "other")
    one, same, other = (fingerprint(tmp_path / name) for name in ("one", "same", "other"))
    assert one == same != other


def randomised(model: PreTrainedModel, **settings: object) -> nn.Module:
    peft_model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, use_dora=True, **settings))
    torch.manual_seed(1)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return peft_model.eval()


def of_peft(model: nn.Module, ending: str) -> Tensor:
    return next(p.detach() for name, p in model.named_parameters() if name.endswith(ending))


@pytest.mark.parametrize(
    ("make", "target"), [(lambda: llama(dtype=torch.float32), "down_proj"), (gpt2, "c_attn")], ids=["linear", "conv1d"]
)
def test_gains_are_those_of_peft(make: object, target: str) -> None:
    plain = make()  # type: ignore[operator]
    weights = LiveWeights(lambda: plain, "")
    name, module = next((n, m) for n, m in plain.named_modules() if n.endswith(target))
    width = weights.shape(f"{name}.weight")[1]  # type: ignore[index]
    adapted = randomised(make(), target_modules=[target])  # type: ignore[operator]
    layer = next(m for n, m in adapted.named_modules() if n.endswith(f"{name}"))
    a, b = of_peft(layer, "lora_A.default.weight"), of_peft(layer, "lora_B.default.weight")
    magnitude = of_peft(layer, "lora_magnitude_vector.default.weight")
    done: list[int] = []
    gain = dora_gain(weights, f"{name}.weight", a, 2.0 * b, magnitude, on_rows=done.append)
    x = torch.randn(3, width)
    base = module(x)
    bias = module.bias if module.bias is not None else torch.zeros(())
    ours = (base - bias + 2.0 * (x @ a.T) @ b.T) * gain + bias
    theirs = layer(x)
    assert (theirs - base).abs().max() > 1e-2
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert sum(done) == len(b)


def test_gains_of_embeddings_are_those_of_peft() -> None:
    plain = llama(dtype=torch.float32)
    weights = LiveWeights(lambda: plain, "")
    adapted = randomised(llama(dtype=torch.float32), target_modules=["embed_tokens"])
    layer = next(m for n, m in adapted.named_modules() if n.endswith("model.embed_tokens"))
    a, b = of_peft(layer, "lora_embedding_A.default").T, 2.0 * of_peft(layer, "lora_embedding_B.default").T
    magnitude = of_peft(layer, "lora_magnitude_vector.default.weight")
    gain = embedding_dora_gain(weights, "model.embed_tokens.weight", a, b, magnitude)
    ids = torch.tensor([3, 90, 3, 7])
    ours = gain * (plain.model.embed_tokens(ids) + a[ids] @ b)
    assert (ours - layer(ids)).abs().max() <= 1e-5 * ours.abs().max()


def test_a_gain_of_nothing_is_one() -> None:
    model = nn.ModuleDict({"linear": nn.Linear(4, 2, bias=False)})
    model["linear"].weight.data.zero_()
    weights = LiveWeights(lambda: model, "")
    gain = dora_gain(weights, "linear.weight", torch.zeros(1, 4), torch.zeros(2, 1), torch.tensor([0.0, 3.0]))
    assert gain[0] == 1 and gain[1] == float("inf")


def test_whole_modules_are_compared_row_by_row() -> None:
    model = llama(dtype=torch.float32)
    weights, name = LiveWeights(lambda: model, ""), "model.embed_tokens.weight"
    own = model.model.embed_tokens.weight.detach().clone()  # [96, 64]
    assert compare(weights, name, own).is_equal
    assert compare(weights, name, own[:50]).is_equal
    few = own.clone()
    few[[5, 90]] += 1
    found = compare(weights, name, few)
    assert found.rows is not None and found.weight is None
    assert found.rows.ids.tolist() == [5, 90] and torch.equal(found.rows.values, few[[5, 90]])
    longer = compare(weights, name, torch.cat([own, torch.zeros(2, 64)]))
    assert longer.rows is not None and longer.rows.ids.tolist() == [96, 97]
    other = compare(weights, name, own + 1)
    assert other.rows is None and other.weight is not None
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight of \(3, 5\) meets a base of \(96, 64\)"):
        compare(weights, name, torch.zeros(3, 5))
