"""Methods other than LoRA, against PEFT's own layers: ΔW to a millionth, every tensor once."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    DeloraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    MissConfig,
    PeftConfig,
    VeraConfig,
)
from torch.utils._python_dispatch import TorchDispatchMode

from adapters.errors import AdapterRefused, RefusalCode
from adapters.folds import shared_projections
from adapters.proposal import PairProposal, Proposal
from adapters.propose import propose
from adapters.recipe import read_recipe
from tests.adapters.peft_files import Saved, assert_same, consumed, delta, header_of, qwen2, save

TARGETS = ["q_proj", "k_proj", "down_proj"]
MASKS = {
    "model.layers.0.self_attn.q_proj.lora_E.default": [True, False, True],
    "model.layers.1.self_attn.q_proj.lora_E.default": [False, False, False],
}
METHODS: dict[str, PeftConfig] = {
    "adalora": AdaLoraConfig(init_r=3, target_r=2, lora_alpha=5, target_modules=TARGETS, total_step=10),
    "adalora, no alpha": AdaLoraConfig(init_r=3, lora_alpha=0, target_modules=TARGETS, total_step=10),
    "adalora, masked": AdaLoraConfig(init_r=3, target_modules=TARGETS, total_step=10, rank_pattern=MASKS),
    "adalora, masked, no alpha": AdaLoraConfig(
        init_r=3, lora_alpha=0, target_modules=TARGETS, total_step=10, rank_pattern=MASKS
    ),
    "loha": LoHaConfig(r=3, alpha=7, target_modules=TARGETS),
    "loha, patterns": LoHaConfig(
        r=3, target_modules=TARGETS, rank_pattern={"layers.0.self_attn.q_proj": 2}, alpha_pattern={"down_proj": 1}
    ),
    "vera": VeraConfig(r=5, target_modules=TARGETS),
    "delora": DeloraConfig(r=3, target_modules=TARGETS, rank_pattern={"down_proj": 2}, lambda_pattern={"q_proj": 2}),
}


def accounted(saved: Saved) -> Proposal:
    """Every tensor is in the proposal, and once, but for VeRA's shared ones."""
    proposal = saved.propose()
    names = [name for name in consumed(proposal) if not name.endswith(("vera_A", "vera_B"))]
    assert len(names) == len(set(names))
    assert set(consumed(proposal)) == set(saved.entries)
    return proposal


def deltas(saved: Saved) -> dict[str, tuple[torch.Tensor, Any]]:
    """module → ΔW as proposed, and PEFT's layer."""
    return {
        pair.source: (delta(pair, saved.tensors, saved.layer(pair.source).base_layer), saved.layer(pair.source))
        for pair in accounted(saved).pairs
    }


@pytest.mark.parametrize("name", METHODS)
def test_folds_are_pefts(name: str, tmp_path: Path) -> None:
    saved = save(tmp_path, METHODS[name])
    found = deltas(saved)
    assert len(found) == (5 if "masked" in name else 6)
    for ours, layer in found.values():
        assert_same(ours, layer.get_delta_weight("default").detach())
    assert saved.recipe.method == name.partition(",")[0]


@pytest.mark.parametrize("fields", [{}, {"init_weights": False}, {"init_weights": "mini", "mini_r": 4}, {"r": 5}])
def test_miss(fields: dict[str, Any], tmp_path: Path) -> None:
    """Its get_delta_weight gives whole weights and not always what its forward computes: the forward decides. r = 5
    divides no width."""
    saved = save(tmp_path, MissConfig(**({"r": 4, "target_modules": TARGETS} | fields)))
    found = deltas(saved)
    assert len(found) == 6
    for ours, layer in found.values():
        x = torch.eye(layer.in_features)
        assert_same(ours.T, (layer(x) - layer.base_layer(x)).detach())


def test_a_module_that_adalora_left_without_ranks_is_dropped(tmp_path: Path) -> None:
    proposal = save(tmp_path, METHODS["adalora, masked"]).propose()
    assert {key.partition(".lora_")[0] for key in proposal.dropped} == {
        "base_model.model.model.layers.1.self_attn.q_proj"
    }
    assert "1 modules" in proposal.warnings[0]


def test_ia3(tmp_path: Path) -> None:
    """Outputs are scaled with the bias among them, a feed-forward module's inputs without."""
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    saved = save(tmp_path, config, base=qwen2)
    proposal = accounted(saved)
    assert len(proposal.vectors) == 4
    for vector in proposal.vectors:
        layer, scales = saved.layer(vector.source), saved.tensors[vector.input]
        x = torch.randn(3, layer.in_features)
        base = layer.base_layer
        is_input = scales.shape[0] == 1
        ours = base(x * scales[0]) if is_input else base(x) * scales[:, 0]
        assert (vector.kind, is_input) == ("ia3", "down_proj" in vector.source)
        assert_same(ours.detach(), layer(x).detach())


def test_ln_tuning(tmp_path: Path) -> None:
    saved = save(tmp_path, LNTuningConfig(target_modules=["norm", "input_layernorm"]))
    proposal = accounted(saved)
    assert {(vector.kind, vector.source) for vector in proposal.vectors} == {
        ("norm", name) for name in ("model.norm", *(f"model.layers.{i}.input_layernorm" for i in (0, 1)))
    }
    for vector in proposal.vectors:
        x = torch.randn(3, 16)
        layer = saved.layer(vector.source)
        normalised = layer.base_layer(x) / layer.base_layer.weight
        assert_same((normalised * saved.tensors[vector.input]).detach(), layer(x).detach())


# --- MLX-LM: its rules, restated here in its own orientation, since MLX itself is for another kind of machine

MLX: dict[str, Any] = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": 3, "scale": 20.0}}


def mlx(folder: Path, shapes: dict[str, tuple[int, ...]], **fields: Any) -> Proposal:
    return propose(read_recipe(json.dumps(MLX | fields).encode()), header_of(shapes, folder))


def test_mlx_linears(tmp_path: Path) -> None:
    """y = W x + scale · (x @ lora_a) @ lora_b."""
    down = "model.layers.0.mlp.down_proj"
    proposal = mlx(tmp_path, {f"{down}.lora_a": (24, 3), f"{down}.lora_b": (3, 16)})
    (pair,) = proposal.pairs
    lora_a, lora_b, x = torch.randn(24, 3), torch.randn(3, 16), torch.randn(5, 24)
    tensors = dict(zip(pair.inputs, (lora_a, lora_b), strict=True))
    ours = delta(pair, tensors, torch.nn.Linear(24, 16))
    torch.testing.assert_close(x @ ours.T, 20.0 * ((x @ lora_a) @ lora_b), rtol=1e-5, atol=1e-4)
    assert (pair.scale, pair.declared_rank, pair.lora_rank) == (20.0, 3, 3)


def test_mlx_dora_and_embeddings(tmp_path: Path) -> None:
    dora = {"q.lora_a": (16, 3), "q.lora_b": (3, 8), "q.m": (8,)}
    (pair,) = mlx(tmp_path, dora, fine_tune_type="dora").pairs
    assert (pair.magnitude, pair.gain_covers_bias, pair.out_features) == ("q.m", False, 8)
    shapes = {"model.embed_tokens.lora_a": (40, 3), "model.embed_tokens.lora_b": (3, 16)}
    (embedding,) = mlx(tmp_path, shapes).embeddings
    assert embedding.is_transposed and embedding.on_tied_head
    assert (embedding.source, embedding.scale, embedding.lora_rank) == ("model.embed_tokens", 20.0, 3)


def test_mlx_configs_as_its_own_trainer_writes_them_are_read(tmp_path: Path) -> None:
    """The trainer dumps all of its options; its loader reads three of them."""
    options = {"adapter_path": "adapters", "batch_size": 4, "iters": 600, "model": "org/base", "train": True, "seed": 0}
    recipe = read_recipe(json.dumps(MLX | options).encode())
    assert (recipe.scales.base_model, recipe.number("scale")) == ("org/base", 20.0)


PAIR = {"q.lora_a": (16, 3), "q.lora_b": (3, 8)}
MLX_REFUSED: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]], RefusalCode, str]] = {
    "full": ({"fine_tune_type": "full"}, PAIR, RefusalCode.UNSUPPORTED, "fine_tune_type=full"),
    "unknown kind": ({"fine_tune_type": "x"}, PAIR, RefusalCode.UNSUPPORTED, "fine_tune_type=x"),
    "no scale": ({"lora_parameters": {"rank": 3}}, PAIR, RefusalCode.CORRUPT, "lora_parameters.scale"),
    "no parameters": ({"lora_parameters": None}, PAIR, RefusalCode.CORRUPT, "lora_parameters"),
    "alpha": (
        {"lora_parameters": {"rank": 3, "scale": 10.0, "alpha": 16}}, PAIR, RefusalCode.AMBIGUOUS_LAYOUT,
        "lora_parameters.alpha=16",
    ),
    "unknown parameter": (
        {"lora_parameters": {"rank": 3, "scale": 10.0, "twist": 1}}, PAIR, RefusalCode.UNKNOWN_FIELD, "twist=1",
    ),
    "a scale past all": (
        {"lora_parameters": {"rank": 3, "scale": 5000}}, PAIR, RefusalCode.UNSUPPORTED, "lora_parameters.scale=5000",
    ),
    "half": ({}, {"q.lora_a": (16, 3)}, RefusalCode.INCOMPLETE_PAIR, "q.lora_a"),
    "not transposed": ({}, {"q.lora_a": (3, 16), "q.lora_b": (8, 3)}, RefusalCode.SHAPE_MISMATCH, "q.lora_a"),
    "m without dora": ({}, PAIR | {"q.m": (8,)}, RefusalCode.KEY_UNMATCHED, "q.m"),
    "dora without m": ({"fine_tune_type": "dora"}, PAIR, RefusalCode.INCOMPLETE_PAIR, "q.lora_a"),
    "m of another width": ({"fine_tune_type": "dora"}, PAIR | {"q.m": (9,)}, RefusalCode.SHAPE_MISMATCH, "q.m"),
    "dora on an embedding": (
        {"fine_tune_type": "dora"}, {"wte.lora_a": (40, 3), "wte.lora_b": (3, 8), "wte.m": (40,)},
        RefusalCode.UNSUPPORTED, "wte.m",
    ),
    "experts": ({}, {"q.lora_a": (4, 3, 16), "q.lora_b": (4, 8, 3)}, RefusalCode.UNSUPPORTED, "q.lora_a"),
    "experts of another rank": (
        {}, {"m.switch_mlp.up_proj.lora_a": (4, 2, 16), "m.switch_mlp.up_proj.lora_b": (4, 8, 2)},
        RefusalCode.SHAPE_MISMATCH, "m.switch_mlp.up_proj.lora_b",
    ),
    "half of experts": (
        {}, {"m.switch_mlp.up_proj.lora_b": (4, 8, 3)}, RefusalCode.INCOMPLETE_PAIR, "m.switch_mlp.up_proj.lora_b",
    ),
    "dora on experts": (
        {"fine_tune_type": "dora"},
        {"m.switch_mlp.up_proj.lora_a": (4, 3, 16), "m.switch_mlp.up_proj.lora_b": (4, 8, 3),
         "m.switch_mlp.up_proj.m": (4, 8)},
        RefusalCode.UNSUPPORTED, "m.switch_mlp.up_proj.m",
    ),
    "quantised": ({}, PAIR | {"q.lora_a_scales": (16, 1)}, RefusalCode.UNSUPPORTED, "q.lora_a_scales"),
    "a leftover": ({}, PAIR | {"q.weight": (8, 16)}, RefusalCode.KEY_UNMATCHED, "q.weight"),
}  # fmt: skip


@pytest.mark.parametrize("name", MLX_REFUSED)
def test_mlx_refusals(name: str, tmp_path: Path) -> None:
    fields, shapes, code, named = MLX_REFUSED[name]
    with pytest.raises(AdapterRefused) as caught:
        mlx(tmp_path, shapes, **fields)
    assert caught.value.reason is code
    assert named in (caught.value.tensor, caught.value.feature) or named in str(caught.value.feature)


ADALORA = {"peft_type": "ADALORA", "init_r": 3, "lora_alpha": 8}
ADALORA_SHAPES = {"q.lora_A": (3, 16), "q.lora_B": (8, 3), "q.lora_E": (3, 1)}
VERA_SHAPES = {
    "base_model.vera_A": (4, 16),
    "base_model.vera_B": (16, 4),
    "q.vera_lambda_d": (4,),
    "q.vera_lambda_b": (8,),
}
LOHA_SHAPES = {"q.hada_w1_a": (8, 2), "q.hada_w1_b": (2, 16), "q.hada_w2_a": (8, 2), "q.hada_w2_b": (2, 16)}
DELORA_SHAPES = {"q.delora_A": (2, 16), "q.delora_B": (8, 2), "q.delora_lambda": (1,), "q.delora_w_norm": (16,)}
OTHERS: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]], RefusalCode, str]] = {
    "adalora: E lacks": (ADALORA, {k: v for k, v in ADALORA_SHAPES.items() if "E" not in k},
                         RefusalCode.INCOMPLETE_PAIR, "q.lora_A"),
    "adalora: mask not applied": (ADALORA | {"rank_pattern": {"q.lora_E": [True, False, True]}}, ADALORA_SHAPES,
                                  RefusalCode.SHAPE_MISMATCH, "rank_pattern"),
    "adalora: mask of numbers": (ADALORA | {"rank_pattern": {"q.lora_E": 3}}, ADALORA_SHAPES,
                                 RefusalCode.CORRUPT, "rank_pattern[q.lora_E]"),
    "adalora: other rank": (ADALORA | {"init_r": 4}, ADALORA_SHAPES, RefusalCode.SHAPE_MISMATCH, "q.lora_E"),
    "adalora: rslora": (ADALORA | {"use_rslora": True}, ADALORA_SHAPES, RefusalCode.UNSUPPORTED, "use_rslora=True"),
    "adalora: B transposed": (ADALORA, ADALORA_SHAPES | {"q.lora_B": (3, 8)}, RefusalCode.SHAPE_MISMATCH, "q.lora_B"),
    "adalora: ranks beside none": (ADALORA | {"rank_pattern": {"q.lora_E": [False] * 3}},
                                   ADALORA_SHAPES | {"q.lora_E": (0, 1)}, RefusalCode.SHAPE_MISMATCH, "q.lora_A"),
    "adalora: B beside none": (ADALORA | {"rank_pattern": {"q.lora_E": [False] * 3}},
                               ADALORA_SHAPES | {"q.lora_E": (0, 1), "q.lora_A": (0, 16)},
                               RefusalCode.SHAPE_MISMATCH, "q.lora_B"),
    "vera: not stored": ({"peft_type": "VERA", "r": 4, "save_projection": False}, VERA_SHAPES,
                         RefusalCode.UNSUPPORTED, "save_projection=false"),
    "vera: stored is not there": ({"peft_type": "VERA", "r": 4}, {k: v for k, v in VERA_SHAPES.items() if "q." in k},
                                  RefusalCode.UNSUPPORTED, "save_projection=false"),
    "vera: lambda too wide": ({"peft_type": "VERA", "r": 4}, VERA_SHAPES | {"q.vera_lambda_b": (17,)},
                              RefusalCode.SHAPE_MISMATCH, "q.vera_lambda_b"),
    "vera: other rank": ({"peft_type": "VERA", "r": 4}, VERA_SHAPES | {"q.vera_lambda_d": (5,)},
                         RefusalCode.SHAPE_MISMATCH, "q.vera_lambda_d"),
    "loha: convolution": ({"peft_type": "LOHA", "r": 2, "alpha": 1}, LOHA_SHAPES | {"q.hada_t1": (2, 2, 3, 3)},
                          RefusalCode.UNSUPPORTED, "q.hada_t1"),
    "loha: half": ({"peft_type": "LOHA", "r": 2, "alpha": 1}, {k: v for k, v in LOHA_SHAPES.items() if "w2_b" not in k},
                   RefusalCode.INCOMPLETE_PAIR, "q.hada_w1_a"),
    "loha: no alpha": ({"peft_type": "LOHA", "r": 2}, LOHA_SHAPES, RefusalCode.CORRUPT, "alpha"),
    "delora: no norms": ({"peft_type": "DELORA", "r": 2}, {k: v for k, v in DELORA_SHAPES.items() if "norm" not in k},
                         RefusalCode.INCOMPLETE_PAIR, "q.delora_A"),
    "delora: norms of another": ({"peft_type": "DELORA", "r": 2}, DELORA_SHAPES | {"q.delora_w_norm": (8,)},
                                 RefusalCode.SHAPE_MISMATCH, "q.delora_w_norm"),
    "miss: bat": ({"peft_type": "MISS", "r": 2, "init_weights": "bat"}, {"q.miss_block": (4, 2, 2)},
                  RefusalCode.UNSUPPORTED, "init_weights=bat"),
    "miss: mini of another width": ({"peft_type": "MISS", "r": 2, "mini_r": 4, "init_weights": "mini"},
                                    {"q.miss_block": (2, 8)}, RefusalCode.SHAPE_MISMATCH, "q.miss_block"),
    "ia3: no vector": ({"peft_type": "IA3"}, {"q.ia3_l": (8, 2)}, RefusalCode.SHAPE_MISMATCH, "q.ia3_l"),
    "ia3: one by one": ({"peft_type": "IA3"}, {"q.ia3_l": (1, 1)}, RefusalCode.AMBIGUOUS_LAYOUT, "q.ia3_l"),
    "ia3: not as listed": ({"peft_type": "IA3", "feedforward_modules": ["q"]}, {"q.ia3_l": (8, 1)},
                           RefusalCode.SHAPE_MISMATCH, "feedforward_modules"),
    "ln: a matrix": ({"peft_type": "LN_TUNING"}, {"q.ln_tuning_layers.weight": (8, 8)},
                     RefusalCode.UNSUPPORTED, "target_modules=q"),
    "another method's tensors": ({"peft_type": "IA3"}, {"q.ia3_l": (8, 1), "q.miss_block": (2, 8)},
                                 RefusalCode.KEY_UNMATCHED, "q.miss_block"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_methods_are_refused_by_name(name: str, tmp_path: Path) -> None:
    fields, shapes, code, named = OTHERS[name]
    with pytest.raises(AdapterRefused) as caught:
        propose(read_recipe(json.dumps(fields).encode()), header_of(shapes, tmp_path))
    assert caught.value.reason is code
    assert named in (caught.value.tensor, caught.value.feature)


def test_what_stored_shapes_cannot_say_is_asked_of_the_pair(tmp_path: Path) -> None:
    def pair(fields: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> PairProposal:
        return propose(read_recipe(json.dumps(fields).encode()), header_of(shapes, tmp_path)).pairs[0]

    vera = pair({"peft_type": "VERA", "r": 4}, VERA_SHAPES)
    miss = pair({"peft_type": "MISS", "r": 2, "mini_r": 4, "init_weights": "mini"}, {"q.miss_block": (2, 4)})
    assert vera.fits is not None and miss.fits is not None
    assert vera.fits(16, 8) and not vera.fits(17, 8)
    assert miss.fits(16, 8) and not miss.fits(16, 10) and not miss.fits(1, 8)


def test_of_veras_shared_projections_only_the_corner_is_converted() -> None:
    """Once for every module: whole, a wide one would cost every module its full size."""
    stored = [torch.ones(2), torch.ones(8), torch.ones(2, 1 << 16).bfloat16(), torch.ones(1 << 16, 2).bfloat16()]
    with CountedNumbers() as counted:
        lora_a, lora_b = shared_projections(stored, 16, 8)
    assert (lora_a.shape, lora_b.shape, lora_a.dtype) == ((2, 16), (8, 2), torch.float32)
    assert counted.largest <= 2 * 16


class CountedNumbers(TorchDispatchMode):
    """The largest tensor that anything but a view gave, in numbers."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.largest = max(self.largest, out.numel())
        return out
