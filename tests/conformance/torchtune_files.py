"""DoRA as torchtune exports it: B of queries and keys in transformers' order of rows, magnitudes in torchtune's own.

Judged by torchtune's rule on the dense weights, in torchtune's order: its hf_to_tune, then
W' = m / ‖W + sBA‖ (W + sBA), then its tune_to_hf.
"""

from pathlib import Path

import torch
from torch import Tensor

from tests.conformance.expert_files import ALPHA, PREFIX, R, _pair
from tests.conformance.making import Adapter, Files, seed_of
from tests.conformance.models import fresh
from tests.conformance.oracle import DenseOracle
from tests.conformance.traits import Traits


def dora_of_queries(traits: Traits, folder: Path) -> Adapter:
    generator = torch.Generator().manual_seed(seed_of(folder))
    model = fresh(traits.architecture)
    head_dim = model.config.head_dim  # type: ignore[union-attr]
    tensors: dict[str, Tensor] = {}
    deltas: dict[str, Tensor] = {}
    for linear in traits.linears:
        last = linear.rpartition(".")[2]
        if last not in ("q_proj", "k_proj", "v_proj"):
            continue
        heads = 1 if last == "v_proj" else traits.shapes[linear][1] // head_dim
        stored = model.get_parameter(f"{linear}.weight").detach().double()  # [out, in]
        own = stored if last == "v_proj" else _to_tune(stored, heads)
        a, b = _pair(generator, *traits.shapes[linear])  # b in torchtune's order
        adapted = own + ALPHA / R * b.double() @ a.double()
        magnitude = (own.norm(dim=1) * (0.6 + 0.8 * torch.rand(len(own), generator=generator))).float()
        after = (magnitude.double() / adapted.norm(dim=1))[:, None] * adapted
        tensors[f"{PREFIX}{linear}.lora_A.weight"] = a
        tensors[f"{PREFIX}{linear}.lora_B.weight"] = b if last == "v_proj" else _to_hf(b, heads)
        tensors[f"{PREFIX}{linear}.lora_magnitude_vector"] = magnitude
        deltas[f"{linear}.weight"] = (after if last == "v_proj" else _to_hf(after, heads)) - stored
    config = {"r": R, "lora_alpha": ALPHA, "target_modules": ["q_proj", "k_proj", "v_proj"], "peft_type": "LORA"}
    Files(config, tensors).write(folder)
    return Adapter(folder, DenseOracle(traits.architecture, deltas))


def _to_tune(weight: Tensor, heads: int) -> Tensor:
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _to_hf(weight: Tensor, heads: int) -> Tensor:
    rows = weight.shape[0] // heads // 2
    return weight.view(heads, rows, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape).contiguous()
