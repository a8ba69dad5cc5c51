"""Every spelling of a vision-language model's text modules reaches the same module, and none reaches nothing.

The oracle is transformers: what its own loader makes of a checkpoint's key, where it knows the spelling.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adapters.errors import AdapterRefused, RefusalCode
from adapters.module_names import BaseModules, LinearShape, locate, resolve
from server.cli_check import outline
from server.config import ModelConfig
from server.engine import probe
from server.engine.base_model import load_base_model
from server.engine.model_outline import auto_class, outline_of
from tests.conformance.models import CONFIGS, build, save

VISION_LANGUAGE = ("qwen2_vl", "qwen2_5_vl", "llava", "gemma3_vl")
DECODER = "model.language_model."
SPELLINGS = (
    "model.language_model.",  # transformers since 4.52
    "model.",  # Qwen2-VL before, and text-only adapters
    "language_model.model.",  # LLaVA and Gemma 3 before
    "language_model.",  # saved from the model without a head
    "",  # saved from the text model alone
    "model.language_model.model.",  # a causal LM inside the new layout
    "model.model.",  # one wrapper too many
    "text_model.",
    "llm.",
)
INNER = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")


def outline_by_config(architecture: str) -> BaseModules:
    with torch.device("meta"):
        return outline_of(build(CONFIGS[architecture]()))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def outlines() -> dict[str, BaseModules]:
    return {name: outline_by_config(name) for name in (*VISION_LANGUAGE, "llama", "mixtral", "phi3")}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("architecture", VISION_LANGUAGE)
def test_every_spelling_reaches_the_text_model(
    architecture: str, spelling: str, outlines: dict[str, BaseModules]
) -> None:
    names = [f"{spelling}layers.{layer}.{inner}" for layer in (0, 1) for inner in INNER]
    resolution = resolve(names, outlines[architecture])
    expected = [f"{DECODER}layers.{layer}.{inner}" for layer in (0, 1) for inner in INNER]
    assert [resolution.modules[name] for name in names] == expected
    assert bool(resolution.rewrite) == (spelling != DECODER)


@pytest.mark.parametrize("architecture", VISION_LANGUAGE)
def test_transformers_agrees_where_it_knows_the_spelling(architecture: str, outlines: dict[str, BaseModules]) -> None:
    """What transformers' rename makes of a key is a module of the model, and it is the one that we find."""
    base = outlines[architecture]
    rename = base.checkpoint_name
    assert rename is not None
    known = {s: rename(f"{s}layers.0.mlp.up_proj") for s in SPELLINGS}
    agreed = [spelling for spelling, name in known.items() if name in base.linears]
    assert len(agreed) >= 2, known
    for spelling in agreed:
        source = f"{spelling}layers.0.mlp.up_proj"
        assert resolve([source], base).modules[source] == known[spelling]


@pytest.mark.parametrize("head", ["lm_head", "model.lm_head", "language_model.lm_head"])
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("architecture", VISION_LANGUAGE)
def test_a_head_may_stand_beside_any_spelling(
    architecture: str, spelling: str, head: str, outlines: dict[str, BaseModules]
) -> None:
    names = [head, f"{spelling}layers.1.mlp.up_proj", f"{spelling}embed_tokens"]
    found = locate(names, outlines[architecture]).modules
    assert list(found.values()) == ["lm_head", f"{DECODER}layers.1.mlp.up_proj", f"{DECODER}embed_tokens"]


@pytest.mark.parametrize(
    ("architecture", "tower"),
    [
        ("qwen2_vl", "visual.blocks.0.attn.qkv"),
        ("qwen2_vl", "model.visual.blocks.0.attn.qkv"),
        ("qwen2_5_vl", "visual.merger.mlp.0"),
        ("llava", "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"),
        ("llava", "multi_modal_projector.linear_1"),
        ("gemma3_vl", "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"),
        ("gemma3_vl", "model.vision_tower.encoder.layers.0.mlp.fc1"),
    ],
)
def test_towers_are_refused_and_not_dropped(architecture: str, tower: str, outlines: dict[str, BaseModules]) -> None:
    old_layout = "language_model.model." if architecture in ("llava", "gemma3_vl") else "model."
    beside = DECODER if tower.startswith("model.") else old_layout
    with pytest.raises(AdapterRefused) as caught:
        resolve([f"{beside}layers.0.self_attn.q_proj", tower], outlines[architecture])
    assert caught.value.reason is RefusalCode.UNSUPPORTED
    assert caught.value.tensor == tower


@pytest.mark.parametrize("architecture", VISION_LANGUAGE)
def test_the_text_model_alone_can_be_targeted(architecture: str, outlines: dict[str, BaseModules]) -> None:
    """A linear that text never passes through would load and do nothing."""
    assert all(name.startswith(DECODER) for name in outlines[architecture].linears)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module."),
        lambda name: name.replace("self_attn.", "self_attn._orig_mod."),
        lambda name: "_fsdp_wrapped_module." + name.replace("layers.1.", "layers.1._checkpoint_wrapped_module."),
        lambda name: name.replace("q_proj", "q_proj._orig_mod"),
    ],
)
@pytest.mark.parametrize("spelling", ["model.", "", "language_model.model."])
def test_wrappers_inside_names(spelling: str, wrap: Callable[[str], str], outlines: dict[str, BaseModules]) -> None:
    plain = [f"layers.{layer}.self_attn.{leaf}_proj" for layer in (0, 1) for leaf in "qv"]
    names = [wrap(spelling + name) for name in plain]
    found = resolve(names, outlines["llama"]).modules
    assert list(found.values()) == [f"model.{name}" for name in plain]


def test_a_part_of_the_base_that_is_named_like_a_wrapper_stays() -> None:
    shape = LinearShape(8, 8)
    base = BaseModules("odd", {"_orig_mod.q": shape, "q": shape})
    assert resolve(["_orig_mod.q", "q"], base).modules == {"_orig_mod.q": "_orig_mod.q", "q": "q"}


def test_two_names_of_one_module_are_refused(outlines: dict[str, BaseModules]) -> None:
    name = "model.layers.0.self_attn.q_proj"
    with pytest.raises(AdapterRefused) as caught:
        locate([name, name.replace("layers.0.", "layers.0._orig_mod.")], outlines["llama"])
    assert caught.value.reason is RefusalCode.AMBIGUOUS_LAYOUT
    with pytest.raises(AdapterRefused) as caught:
        locate(["lm_head", "model.lm_head"], outlines["llama"])
    assert caught.value.reason is RefusalCode.AMBIGUOUS_LAYOUT


@pytest.mark.parametrize("name", ["model.layers.2.self_attn.q_proj", "nowhere.layers.0.self_attn.q_proj", "model.x"])
@pytest.mark.parametrize("architecture", [*VISION_LANGUAGE, "llama"])
def test_what_reaches_nothing_is_refused_with_all_beside_it(
    architecture: str, name: str, outlines: dict[str, BaseModules]
) -> None:
    with pytest.raises(AdapterRefused) as caught:
        resolve(["model.layers.0.self_attn.q_proj", name], outlines[architecture])
    assert caught.value.reason is RefusalCode.KEY_UNMATCHED


def test_experts_and_fused_parts_are_found_by_their_own_names(outlines: dict[str, BaseModules]) -> None:
    old, new = "model.layers.0.block_sparse_moe.experts", "model.layers.0.mlp.experts"
    names = [f"{old}.3.w1", f"{old}.0.w2", "model.layers.0.self_attn.q_proj"]
    assert list(locate(names, outlines["mixtral"]).modules.values()) == [f"{new}.3.w1", f"{new}.0.w2", names[2]]
    with pytest.raises(AdapterRefused):
        locate([f"{old}.4.w1"], outlines["mixtral"])
    split = ["layers.0.self_attn.q_proj", "layers.0.mlp.up_proj"]
    assert list(locate(split, outlines["phi3"]).modules.values()) == [f"model.{name}" for name in split]
    with pytest.raises(AdapterRefused) as caught:
        resolve(split, outlines["phi3"])
    assert caught.value.reason is RefusalCode.KEY_UNMATCHED


@pytest.mark.parametrize("architecture", VISION_LANGUAGE)
def test_the_text_side_of_a_vision_language_model_is_served(architecture: str, tmp_path: Path) -> None:
    """Built, bound, and its packed, paged, chunked logits are its own."""
    folder = save(architecture, tmp_path / architecture)
    base = load_base_model(folder, architecture, ModelConfig(dtype="float32", device="cpu"))
    assert auto_class(base.config).__name__ == (
        "AutoModelForCausalLM" if architecture == "gemma3_vl" else "AutoModelForImageTextToText"
    )
    probe.check(base)
    by_config, _ = outline(folder)
    assert (by_config.linears, by_config.head, by_config.embedding) == (
        base.modules.linears, base.modules.head, base.modules.embedding
    )  # fmt: skip
