"""loralib checkpoints: PEFT with the converted folder computes what loralib's layers compute."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.convert.base_outline import BaseOutline
from adapters.convert.conversion import Conversion
from adapters.convert.convert_report import compare_written
from adapters.convert.failure import CannotConvert
from adapters.convert.loralib import LoralibOptions, convert_loralib
from adapters.convert.peft_folder import folder_aside, write_peft_folder
from tests.adapters.convert.loralib_layers import Embedding, Linear, MergedLinear, lora_state_dict
from tests.adapters.convert.peft_twins import PROMPT, load_base, peft_logits

ALPHA = 12.0


def _put(model: Any, name: str, make: Callable[[Any], Any]) -> None:
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, make(model.get_submodule(name)))


def _trained(base: Path, modules: dict[str, Callable[[Any], Any]], *, move_biases: bool = False) -> Any:
    torch.manual_seed(3)
    model = load_base(base)
    for name, make in modules.items():
        _put(model, name, make)
    for name, parameter in model.named_parameters():
        if move_biases and name.endswith("bias"):
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def _convert(base: Path, out: Path, tensors: dict[str, Tensor], **options: Any) -> Conversion:
    outline = BaseOutline.of(load_base(base))
    made = convert_loralib(tensors, outline, LoralibOptions("the/base", ALPHA, **options))
    with folder_aside(out) as folder:
        write_peft_folder(folder, made.config, made.tensors, {})
        errors = compare_written(folder, made)
    assert errors.modules and max(error.relative for error in errors.modules.values()) < 1e-6
    assert max(errors.kept.values(), default=0.0) == 0.0
    return made


@torch.no_grad()
def _assert_equal(base: Path, model: Any, out: Path) -> None:
    wanted, plain, got = model(PROMPT).logits, peft_logits(base, None), peft_logits(base, out)
    scale = float(wanted.abs().max())
    assert float((wanted - plain).abs().max()) > 1e-2 * scale
    assert float((wanted - got).abs().max()) <= 1e-5 * scale


def _merged(*enabled: bool, r: int = 3) -> Callable[[Any], Any]:
    return lambda module: MergedLinear(module, r, ALPHA, enabled)


def _linear(r: int = 3) -> Callable[[Any], Any]:
    return lambda module: Linear(module, r, ALPHA)


ENABLED = [(True, False, True), (True, True, True), (False, True, False), (True, True, False), (False, False, True)]


@pytest.mark.parametrize("enabled", ENABLED, ids=str)
def test_a_merged_linear_becomes_one_pair_with_its_slices_in_place(
    enabled: tuple[bool, ...], gpt2_folder: Path, tmp_path: Path
) -> None:
    model = _trained(gpt2_folder, {f"transformer.h.{i}.attn.c_attn": _merged(*enabled) for i in range(2)})
    made = _convert(gpt2_folder, tmp_path / "out", lora_state_dict(model), enable_lora=enabled)
    assert made.config["r"] == 3 * sum(enabled)
    _assert_equal(gpt2_folder, model, tmp_path / "out")


def test_linears_of_several_ranks_keep_their_own_scales(llama_folder: Path, tmp_path: Path) -> None:
    modules = {
        "model.layers.0.self_attn.q_proj": _linear(2),
        "model.layers.1.self_attn.q_proj": _linear(4),
        "model.layers.1.mlp.down_proj": _linear(4),
    }
    model = _trained(llama_folder, modules)
    made = _convert(llama_folder, tmp_path / "out", lora_state_dict(model))
    assert made.config["rank_pattern"] == {"model.layers.0.self_attn.q_proj": 2}
    _assert_equal(llama_folder, model, tmp_path / "out")


def test_merged_plain_and_embedding_in_one_checkpoint(gpt2_folder: Path, tmp_path: Path) -> None:
    modules = {
        "transformer.h.0.attn.c_attn": _merged(True, False, True),
        "transformer.h.1.mlp.c_fc": _linear(5),
        "transformer.wte": lambda module: Embedding(module, 2, ALPHA),
    }
    model = _trained(gpt2_folder, modules)
    _convert(gpt2_folder, tmp_path / "out", lora_state_dict(model), enable_lora=(True, False, True))
    _assert_equal(gpt2_folder, model, tmp_path / "out")


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_replace_those_of_the_base(bias: str, gpt2_folder: Path, tmp_path: Path) -> None:
    modules = {"transformer.h.0.attn.c_attn": _merged(True, True, False), "transformer.h.1.mlp.c_proj": _linear()}
    model = _trained(gpt2_folder, modules, move_biases=True)
    tensors = lora_state_dict(model, bias)
    made = _convert(gpt2_folder, tmp_path / "out", tensors, enable_lora=(True, True, False))
    assert made.config["bias"] == bias
    if bias == "lora_only":  # what it does not save stays the base's
        plain = load_base(gpt2_folder).state_dict()
        untouched = {n: t for n, t in plain.items() if n.endswith("bias") and n not in tensors}
        model.load_state_dict(untouched, strict=False)
    _assert_equal(gpt2_folder, model, tmp_path / "out")


def test_names_without_the_causal_models_prefix_are_found(gpt2_folder: Path, tmp_path: Path) -> None:
    model = _trained(gpt2_folder, {"transformer.h.0.attn.c_attn": _merged(True, False, True)})
    tensors = {f"module.{n.removeprefix('transformer.')}": t for n, t in lora_state_dict(model).items()}
    _convert(gpt2_folder, tmp_path / "out", tensors, enable_lora=(True, False, True))
    _assert_equal(gpt2_folder, model, tmp_path / "out")


def test_other_slices_are_other_logits(gpt2_folder: Path, tmp_path: Path) -> None:
    """So the tests above can tell."""
    model = _trained(gpt2_folder, {"transformer.h.0.attn.c_attn": _merged(True, False, True)})
    _convert(gpt2_folder, tmp_path / "out", lora_state_dict(model), enable_lora=(True, True, False))
    with pytest.raises(AssertionError):
        _assert_equal(gpt2_folder, model, tmp_path / "out")


C_ATTN = "transformer.h.0.attn.c_attn"
REFUSED: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Any], str]] = {
    "no slices said": ({f"{C_ATTN}.lora_A": (6, 48), f"{C_ATTN}.lora_B": (96, 3)}, {}, "2 slices of its output"),
    "wrong slices": (
        {f"{C_ATTN}.lora_A": (6, 48), f"{C_ATTN}.lora_B": (96, 3)},
        {"enable_lora": (True, False, False)},
        "the base needs A [1·r, 48] and B [48, r]",
    ),
    "indivisible": (
        {f"{C_ATTN}.lora_A": (6, 48), f"{C_ATTN}.lora_B": (96, 3)},
        {"enable_lora": (True,) * 5},
        "5 slices do not divide",
    ),
    "other base": ({f"{C_ATTN}.lora_A": (3, 32), f"{C_ATTN}.lora_B": (144, 3)}, {}, "the base needs A [.., 48]"),
    "half a pair": ({f"{C_ATTN}.lora_A": (3, 48)}, {}, "has no lora_B"),
    "unknown module": ({"transformer.h.0.attn.query.lora_A": (3, 48)}, {}, "are not in the base"),
    "whole weight": (
        {f"{C_ATTN}.lora_A": (3, 48), f"{C_ATTN}.lora_B": (144, 3), f"{C_ATTN}.weight": (144, 48)},
        {},
        "no tensor is left out",
    ),
    "other rank": ({f"{C_ATTN}.lora_A": (3, 48), f"{C_ATTN}.lora_B": (144, 3)}, {"rank": 4}, "--rank says 4"),
    "norm": ({"transformer.h.0.ln_1.lora_A": (3, 48), "transformer.h.0.ln_1.lora_B": (48, 3)}, {}, "neither a linear"),
    "bias length": ({"transformer.h.0.ln_1.bias": (47,)}, {}, "the base has a bias [48] there"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_the_base_is_refused_by_name(case: str, gpt2_folder: Path) -> None:
    shapes, options, why = REFUSED[case]
    outline = BaseOutline.of(load_base(gpt2_folder))
    with pytest.raises(CannotConvert, match=re.escape(why)):
        convert_loralib({n: torch.randn(s) for n, s in shapes.items()}, outline, LoralibOptions("b", ALPHA, **options))
