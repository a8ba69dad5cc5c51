"""Pairs under any names: every way of storing them gives the same ΔW, and what shapes cannot tell is asked for."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from adapters.convert.base_outline import BaseOutline
from adapters.convert.convert_report import compare_written
from adapters.convert.failure import CannotConvert
from adapters.convert.pairs import PairsOptions, convert_pairs
from adapters.convert.peft_folder import folder_aside, write_peft_folder
from tests.adapters.convert.peft_twins import PROMPT, load_base, peft_logits

MODULES = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.v_proj"]
SQUARE = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj"]
TEMPLATE = {"u": "{module}.U", "v": "{module}.V"}


@pytest.fixture(scope="module")
def outline(llama_folder: Path) -> BaseOutline:
    return BaseOutline.of(load_base(llama_folder))


def _pairs(outline: BaseOutline, modules: list[str], *, r: int = 3) -> dict[str, tuple[Tensor, Tensor]]:
    """module → B [out, r], A [r, in]"""
    torch.manual_seed(5)
    shapes = {module: outline.linears[module] for module in modules}
    return {m: (torch.randn(out, r) * 0.2, torch.randn(r, width) * 0.2) for m, (out, width) in shapes.items()}


def _stored(
    pairs: dict[str, tuple[Tensor, Tensor]], orientation: str, u_first: bool, v_first: bool
) -> dict[str, Tensor]:
    tensors = {}
    for module, (lora_b, lora_a) in pairs.items():
        u, v = (lora_b.T, lora_a) if orientation == "uv" else (lora_a, lora_b.T)  # [r, width] both
        tensors[f"{module}.U"] = (u if u_first else u.T).contiguous()
        tensors[f"{module}.V"] = (v if v_first else v.T).contiguous()
    return tensors


def _write(
    out: Path, tensors: dict[str, Tensor], outline: BaseOutline, name_map: dict[str, Any], **options: Any
) -> None:
    made = convert_pairs(tensors, outline, PairsOptions("the/base", name_map, **options))
    with folder_aside(out) as folder:
        write_peft_folder(folder, made.config, made.tensors, {})
        errors = compare_written(folder, made)
    assert errors.modules and max(error.relative for error in errors.modules.values()) < 1e-6


@torch.no_grad()
def _logits_with(base: Path, pairs: dict[str, tuple[Tensor, Tensor]], scales: dict[str, float]) -> Tensor:
    """The base whose linears add scale · x·Aᵀ·Bᵀ to what they compute."""
    model = load_base(base)
    for module, (lora_b, lora_a) in pairs.items():

        def add(_: Any, inputs: Any, output: Tensor, b: Tensor = lora_b, a: Tensor = lora_a, m: str = module) -> Tensor:
            return output + scales[m] * functional.linear(functional.linear(inputs[0], a), b)

        model.get_submodule(module).register_forward_hook(add)
    logits = model(PROMPT).logits
    assert isinstance(logits, Tensor)
    return logits


def _assert_equal(base: Path, wanted: Tensor, out: Path) -> None:
    plain, got = peft_logits(base, None), peft_logits(base, out)
    scale = float(wanted.abs().max())
    assert float((wanted - plain).abs().max()) > 1e-2 * scale
    assert float((wanted - got).abs().max()) <= 1e-5 * scale


@pytest.mark.parametrize("orientation", ["uv", "vu"])
@pytest.mark.parametrize("u_first", [False, True], ids=["u[o,r]", "u[r,o]"])
@pytest.mark.parametrize("v_first", [False, True], ids=["v[i,r]", "v[r,i]"])
def test_the_bases_shapes_tell_how_pairs_are_stored(
    orientation: str, u_first: bool, v_first: bool, llama_folder: Path, outline: BaseOutline, tmp_path: Path
) -> None:
    pairs = _pairs(outline, MODULES + SQUARE)
    _write(tmp_path / "out", _stored(pairs, orientation, u_first, v_first), outline, TEMPLATE)
    _assert_equal(llama_folder, _logits_with(llama_folder, pairs, dict.fromkeys(pairs, 1.0)), tmp_path / "out")


@pytest.mark.parametrize("orientation", ["uv", "vu"])
def test_of_square_weights_the_map_must_tell(
    orientation: str, llama_folder: Path, outline: BaseOutline, tmp_path: Path
) -> None:
    pairs = _pairs(outline, SQUARE)
    tensors = _stored(pairs, orientation, False, True)
    with pytest.raises(CannotConvert, match="orientation"):
        convert_pairs(tensors, outline, PairsOptions("b", TEMPLATE))
    _write(tmp_path / "out", tensors, outline, {**TEMPLATE, "orientation": orientation})
    _assert_equal(llama_folder, _logits_with(llama_folder, pairs, dict.fromkeys(pairs, 1.0)), tmp_path / "out")


def test_each_module_by_itself_with_a_scale_of_its_own(
    llama_folder: Path, outline: BaseOutline, tmp_path: Path
) -> None:
    pairs = _pairs(outline, MODULES)
    tensors, modules, scales = {}, {}, {}
    for i, (module, (lora_b, lora_a)) in enumerate(pairs.items()):
        tensors |= {f"up.{i}": lora_b, f"down.{i}": lora_a}
        modules[module] = {"u": f"up.{i}", "v": f"down.{i}"} | ({"scale": i - 2.5} if i else {})
        scales[module] = i - 2.5 if i else 2.0
    _write(tmp_path / "out", tensors, outline, {"modules": modules, "scale": 2})
    _assert_equal(llama_folder, _logits_with(llama_folder, pairs, scales), tmp_path / "out")


def test_alpha_is_divided_by_each_rank(llama_folder: Path, outline: BaseOutline, tmp_path: Path) -> None:
    pairs = _pairs(outline, MODULES[:1], r=2) | _pairs(outline, MODULES[1:], r=5)
    _write(tmp_path / "out", _stored(pairs, "uv", False, True), outline, TEMPLATE, alpha=6.0)
    scales = {module: 6.0 / lora_a.shape[0] for module, (_, lora_a) in pairs.items()}
    _assert_equal(llama_folder, _logits_with(llama_folder, pairs, scales), tmp_path / "out")


UP = "model.layers.0.mlp.up_proj"  # [80, 48]
GOOD = {f"{UP}.U": (80, 3), f"{UP}.V": (3, 48)}
REFUSED: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Any], dict[str, Any], str]] = {
    "left over": ({**GOOD, "extra": (3, 3)}, TEMPLATE, {}, "1 tensors are in no pair of the map, such as extra"),
    "lone": ({f"{UP}.U": (80, 3)}, TEMPLATE, {}, "has only one of"),
    "none": (GOOD, {"u": "{module}.P", "v": "{module}.Q"}, {}, "no tensor is called {module}.P"),
    "no place": (GOOD, {"u": "U", "v": "V"}, {}, "has no {module} in it"),
    "no names": (GOOD, {"u": "{module}.U"}, {}, 'no names for "u" and "v"'),
    "unknown field": (GOOD, {**TEMPLATE, "alpha": 3}, {}, "the map has alpha"),
    "shape": ({f"{UP}.U": (81, 3), f"{UP}.V": (3, 48)}, TEMPLATE, {}, f"{UP} is [80, 48] in the base; u [81, 3]"),
    "rank": (GOOD, TEMPLATE, {"rank": 4}, "of the rank asked for"),
    "two ranks": ({f"{UP}.U": (80, 3), f"{UP}.V": (4, 48)}, TEMPLATE, {}, "are no pair"),
    "mixed layouts": (
        {**GOOD, "model.layers.1.mlp.up_proj.U": (3, 80), "model.layers.1.mlp.up_proj.V": (3, 48)},
        TEMPLATE,
        {},
        "stored as those before it",
    ),
    "unknown module": ({"a.b.U": (80, 3), "a.b.V": (3, 48)}, TEMPLATE, {}, "are not in the base, such as a.b"),
    "no linear": ({"model.norm.U": (4, 2), "model.norm.V": (2, 4)}, TEMPLATE, {}, "are not in the base"),
    "embedding": ({"model.embed_tokens.U": (96, 2), "model.embed_tokens.V": (2, 48)}, TEMPLATE, {}, "is no linear"),
    "twice": (GOOD, {"modules": {UP: {"u": f"{UP}.U", "v": f"{UP}.U"}}}, {}, "named twice"),
    "two scales": (GOOD, {**TEMPLATE, "scale": 2}, {"alpha": 3.0}, "both --alpha and a scale"),
    "scale": (GOOD, {**TEMPLATE, "scale": "2"}, {}, "scale is 2, and a number is needed"),
    "orientation": (GOOD, {**TEMPLATE, "orientation": "up"}, {}, '"orientation" in the map is up'),
    "three dimensions": ({f"{UP}.U": (1, 80, 3), f"{UP}.V": (3, 48)}, TEMPLATE, {}, "no matrix"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_place_is_refused_by_name(case: str, outline: BaseOutline) -> None:
    shapes, name_map, options, why = REFUSED[case]
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    with pytest.raises(CannotConvert, match=re.escape(why)):
        convert_pairs(tensors, outline, PairsOptions("b", name_map, **options))
