"""PiSSA, OLoRA and KaSA: PEFT with the converted folder on the untouched base computes what PEFT computes with the
unconverted one, for which it takes the base apart anew.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import KasaConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adapters.convert.base_outline import BaseOutline
from adapters.convert.convert_report import compare_written
from adapters.convert.failure import CannotConvert
from adapters.convert.formats import Base, ConvertOptions, convert, format_of
from adapters.convert.peft_folder import folder_aside, write_peft_folder
from adapters.convert.source_files import Source, read_source
from adapters.convert.taken_out import Method, dense_rows, factors
from server.engine.live_weights import LiveWeights
from tests.adapters.convert.peft_twins import assert_same_logits, load_base, peft_logits, save_adapter, save_base

TARGETS = ["q_proj", "k_proj", "o_proj", "gate_proj", "down_proj"]
GPT2_TARGETS = ["c_attn", "mlp.c_proj", "mlp.c_fc"]
METHODS: dict[Method, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "kasa": {"kasa_config": KasaConfig()},
}
PATTERNS = {
    "rank_pattern": {"layers.0.self_attn.q_proj": 6, "down_proj": 3},
    "alpha_pattern": {r"layers\.1\..*": 5, "k_proj": 32},
}


def _convert(source: Path | Source, base: Path, out: Path, *, dtype: torch.dtype = torch.float32) -> tuple[str, ...]:
    """The worst error is checked, and the warnings are returned."""
    model = load_base(base, dtype)
    read = source if isinstance(source, Source) else read_source(source)
    options = ConvertOptions("the/base")
    access = Base(BaseOutline.of(model), lambda: (LiveWeights(lambda: model, "print"), dtype))
    made = convert(read, format_of(read, None, options), access, options)
    with folder_aside(out) as folder:
        write_peft_folder(folder, made.config, made.tensors, read.companions)
        errors = compare_written(folder, made)
    assert errors.modules and min(error.norm for error in errors.modules.values()) > 1e-2
    assert max(error.relative for error in errors.modules.values()) < 1e-4  # of a float32 SVD, which PEFT's is too
    return made.warnings


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("patterned", [False, True], ids=["plain", "patterns"])
@pytest.mark.parametrize("use_rslora", [False, True], ids=["", "rslora"])
def test_the_converted_adapter_computes_what_peft_replays(
    method: Method, patterned: bool, use_rslora: bool, llama_folder: Path, tmp_path: Path
) -> None:
    extra = METHODS[method] | (PATTERNS if patterned else {})
    save_adapter(llama_folder, tmp_path / "in", target_modules=TARGETS, use_rslora=use_rslora, **extra)
    assert not _convert(tmp_path / "in", llama_folder, tmp_path / "out")
    assert_same_logits(llama_folder, tmp_path / "in", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True and config["kasa_config"] is None and config["r"] == 8


@pytest.mark.parametrize("method", METHODS)
def test_without_the_conversion_it_would_be_wrong(method: Method, llama_folder: Path, tmp_path: Path) -> None:
    """A server that reads A and B and leaves the base as it is: what the conversion is for."""
    folder = save_adapter(llama_folder, tmp_path / "in", target_modules=TARGETS, **METHODS[method])
    wanted = peft_logits(llama_folder, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    changed = config | {"init_lora_weights": True, "kasa_config": None}
    (folder / "adapter_config.json").write_text(json.dumps(changed))
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({n: t for n, t in tensors.items() if "diag" not in n}, folder / "adapter_model.safetensors")
    assert float((peft_logits(llama_folder, folder) - wanted).abs().max()) > 1e-2 * float(wanted.abs().max())


@pytest.mark.parametrize(("method", "targets"), [("pissa", GPT2_TARGETS), ("olora", ["attn.c_proj"])])
def test_weights_stored_the_other_way_round(
    method: Method, targets: list[str], gpt2_folder: Path, tmp_path: Path
) -> None:
    """GPT-2's Conv1D. PEFT turns it for PiSSA and not for OLoRA, which therefore runs on square weights alone."""
    extra = METHODS[method]
    save_adapter(gpt2_folder, tmp_path / "in", target_modules=targets, fan_in_fan_out=True, **extra)
    _convert(tmp_path / "in", gpt2_folder, tmp_path / "out")
    assert_same_logits(gpt2_folder, tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize(
    "extra",
    [
        {"use_dora": True},
        {"modules_to_save": ["norm"]},
        {"target_modules": ["embed_tokens", "lm_head", *TARGETS]},
        {"target_modules": ["embed_tokens", "lm_head", *TARGETS], "use_dora": True},
        {"trainable_token_indices": [3, 5]},
    ],
    ids=lambda extra: "+".join(extra),
)
@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_what_comes_beside_the_pairs_goes_along(
    method: Method, extra: dict[str, Any], llama_folder: Path, tmp_path: Path
) -> None:
    save_adapter(llama_folder, tmp_path / "in", **{"target_modules": TARGETS, **METHODS[method], **extra})
    _convert(tmp_path / "in", llama_folder, tmp_path / "out")
    assert_same_logits(llama_folder, tmp_path / "in", tmp_path / "out")
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert "base_model.model.lm_head.base_layer.weight" not in written, "what was left of a weight is dropped"


def test_biases_go_along(gpt2_folder: Path, tmp_path: Path) -> None:
    extra = {"target_modules": GPT2_TARGETS, "fan_in_fan_out": True, "bias": "all", **METHODS["pissa"]}
    save_adapter(gpt2_folder, tmp_path / "in", **extra)
    _convert(tmp_path / "in", gpt2_folder, tmp_path / "out")
    assert_same_logits(gpt2_folder, tmp_path / "in", tmp_path / "out")


def test_a_pickled_one_is_converted_at_once(llama_folder: Path, tmp_path: Path) -> None:
    save_adapter(llama_folder, tmp_path / "in", safe=False, target_modules=TARGETS, **METHODS["pissa"])
    _convert(tmp_path / "in", llama_folder, tmp_path / "out")
    assert_same_logits(llama_folder, tmp_path / "in", tmp_path / "out")


def test_the_factors_are_as_small_as_the_change(llama_folder: Path, tmp_path: Path) -> None:
    """So that 16 bits keep it: stacked side by side, A and B would be as large as the base's first components."""
    save_adapter(llama_folder, tmp_path / "in", target_modules=TARGETS, moved=0.005, **METHODS["pissa"])
    read, model = read_source(tmp_path / "in"), load_base(llama_folder)
    access = Base(BaseOutline.of(model), lambda: (LiveWeights(lambda: model, "print"), torch.float32))
    made = convert(read, "pissa", access, ConvertOptions())
    cast = made.in_dtype(torch.bfloat16)
    with folder_aside(tmp_path / "out") as folder:
        write_peft_folder(folder, cast.config, cast.tensors, {})
        errors = compare_written(folder, cast).modules
    assert 1e-4 < max(error.relative for error in errors.values()) < 2**-7
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    stacked = _stacked(read.tensors, model, name, scale=2.0)
    rounded = [half.bfloat16().double() for half in stacked]
    exact = stacked[1].double() @ stacked[0].double()
    naive = float((rounded[1] @ rounded[0] - exact).norm() / exact.norm())
    assert naive > 5 * errors["model.layers.0.self_attn.q_proj"].relative


def _stacked(tensors: Any, model: nn.Module, name: str, *, scale: float) -> tuple[Tensor, Tensor]:
    weight = model.get_submodule(name.removeprefix("base_model.model.")).weight.data
    assert isinstance(weight, Tensor)
    lora_a, lora_b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
    taken = factors("pissa", weight, len(lora_a), scale, is_transposed=False)
    return torch.cat([lora_a, taken.right]), torch.cat([scale * lora_b, -taken.left], dim=1)


def test_a_base_in_16_bits_is_told_of(tmp_path: Path) -> None:
    """PEFT rounds what it leaves of W, so the two differ by that much and the report says so."""
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    save_adapter(base, tmp_path / "in", target_modules=TARGETS, **METHODS["pissa"])
    (warning,) = _convert(tmp_path / "in", base, tmp_path / "out", dtype=torch.bfloat16)
    assert "the base is bfloat16" in warning and "of ‖ΔW‖" in warning


def test_singular_values_too_close_together_are_told_of(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = torch.linalg.qr(torch.randn(48, 48)).Q.contiguous()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    save_adapter(base, tmp_path / "in", target_modules=["q_proj"], **METHODS["pissa"])
    model, read = load_base(base), read_source(tmp_path / "in")
    access = Base(BaseOutline.of(model), lambda: (LiveWeights(lambda: model, "print"), torch.float32))
    (warning,) = convert(read, "pissa", access, ConvertOptions()).warnings
    assert "taken out of 1 modules, such as model.layers.0.self_attn.q_proj, is not unique" in warning


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)], ids=str)
@pytest.mark.parametrize("is_transposed", [False, True], ids=["[out,in]", "[in,out]"])
def test_both_ways_to_what_was_taken_out_agree(method: Method, shape: tuple[int, int], is_transposed: bool) -> None:
    torch.manual_seed(7)
    weight = torch.randn(shape)
    taken = factors(method, weight, 5, 1.5, is_transposed=is_transposed)
    rows = dense_rows(method, weight, 5, 1.5, is_transposed=is_transposed)
    dense = taken.left.double() @ taken.right.double()
    assert taken.gap > 1e-5 and float(dense.norm()) > 0.1
    assert torch.linalg.matrix_rank(dense, rtol=1e-5) == 5
    for begin, end in ((0, shape[0]), (3, 11)):
        assert torch.allclose(rows(begin, end), dense[begin:end], rtol=0, atol=2e-5)


# Refusals.


def _change_config(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _change_tensors(folder: Path, **changes: Tensor | None) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for part, tensor in changes.items():
        name = next(name for name in sorted(tensors) if name.endswith(part.replace("__", ".")))
        tensors.pop(name)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, path)


REFUSED: dict[str, tuple[Any, str]] = {
    "niter": (lambda f: _change_config(f, init_lora_weights="pissa_niter_4"), "path_initial_model_for_weight"),
    "corda": (lambda f: _change_config(f, init_lora_weights="corda"), "needs the training data"),
    "loftq": (lambda f: _change_config(f, init_lora_weights="loftq"), "was quantised"),
    "lora_ga": (lambda f: _change_config(f, init_lora_weights="lora_ga"), "needs gradients"),
    "alora": (lambda f: _change_config(f, alora_invocation_tokens=[3]), "pissa with alora_invocation_tokens"),
    "experts": (lambda f: _change_config(f, target_parameters=["a"]), "pissa with target_parameters"),
    "twice": (lambda f: _change_config(f, kasa_config={"beta": 1}), "changed twice"),
    "rank": (lambda f: _change_config(f, r=5), "has rank 4, its config says 5"),
    "no alpha": (lambda f: _change_config(f, lora_alpha=None), "lora_alpha is None"),
    "odd pattern": (lambda f: _change_config(f, rank_pattern={"a": "4"}), "a positive integer is needed"),
    "half": (lambda f: _change_tensors(f, lora_B__weight=None), "or one of them is missing"),
    "shape": (lambda f: _change_tensors(f, lora_A__weight=torch.zeros(4, 47)), "is it the base of the training"),
    "no diagonal": (
        lambda f: _change_config(f, init_lora_weights=True, kasa_config={"beta": 1}),
        "lora_diag is missing",
    ),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "no adapter_config.json beside it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_replayed_is_refused_by_name(case: str, llama_folder: Path, tmp_path: Path) -> None:
    change, why = REFUSED[case]
    folder = save_adapter(llama_folder, tmp_path / "in", target_modules=["q_proj"], **METHODS["pissa"])
    change(folder)
    with pytest.raises(CannotConvert, match=re.escape(why)):
        _convert(folder, llama_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_base_is_noticed_by_its_head(llama_folder: Path, tmp_path: Path) -> None:
    """The head's weight, as it was left, is in the file; of the other modules nothing is, and nothing can be said."""
    save_adapter(llama_folder, tmp_path / "in", target_modules=["lm_head"], **METHODS["pissa"])
    other = save_base(tmp_path / "other", seed=9)
    with pytest.raises(CannotConvert, match="not what pissa leaves of this base"):
        _convert(tmp_path / "in", other, tmp_path / "out")


def test_a_head_that_shares_its_weight_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "gpt2", "gpt2")
    save_adapter(base, tmp_path / "in", target_modules=["lm_head"], **METHODS["pissa"])
    with pytest.raises(CannotConvert, match="lm_head shares its weight with the embedding"):
        _convert(tmp_path / "in", base, tmp_path / "out")
