"""What a load of the default shape costs: few operations, each of which gives up the interpreter's lock.

Counted, not timed, so that a busy machine does not decide.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from adapters.checkpoint import CheckpointLimits, load_lora_model
from adapters.module_names import BaseModules, LinearShape
from adapters.plan_cache import PlanCache
from tests.adapters.hostile import WEIGHTS, write_config

SHAPES = {"q_proj": (576, 576), "k_proj": (576, 192), "v_proj": (576, 192), "o_proj": (576, 576)}
SHAPES |= {"gate_proj": (576, 1536), "up_proj": (576, 1536), "down_proj": (1536, 576)}
NUM_LAYERS = 30
BASE = BaseModules(
    "llama",
    {f"model.layers.{i}.{kind}": LinearShape(*shape) for i in range(NUM_LAYERS) for kind, shape in SHAPES.items()},
)
LIMITS = CheckpointLimits(max_lora_rank=64, max_adapter_bytes=1 << 28)


class Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def python_calls() -> Iterator[list[int]]:
    found = [0]

    def count(frame: Any, event: str, argument: Any) -> None:
        found[0] += event == "call"

    sys.setprofile(count)
    try:
        yield found
    finally:
        sys.setprofile(None)


def test_a_load_of_420_tensors_takes_few_operations(tmp_path: Path) -> None:
    tensors = {}
    for name, shape in BASE.linears.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(4, shape.in_features).half()
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(shape.out_features, 4).half()
    save_file(tensors, tmp_path / WEIGHTS)
    write_config(tmp_path, {"peft_type": "LORA", "r": 4, "lora_alpha": 8})
    plans = PlanCache()

    def load() -> None:
        load_lora_model(tmp_path, BASE, limits=LIMITS, dtype=torch.bfloat16, plans=plans)

    load()
    with Counted() as counted:
        load()
    assert counted.count <= 40 * len(SHAPES), f"{counted.count} operations of torch for {len(tensors)} tensors"
    with python_calls() as calls:
        load()
    assert calls[0] <= 20 * len(BASE.linears), f"{calls[0]} calls for {len(tensors)} tensors whose plan is known"
