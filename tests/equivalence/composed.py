"""The oracle of several adapters at once: y = W x + Σ w (PEFT's module with that adapter (x) − W x), at every module.

Each adapter is PEFT's, alone on a model of its own; the sum is taken by hooks on one more. Nothing of ours.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from tests.equivalence.oracle import fresh_base


def composed_logits(
    base: Path, adapters: list[tuple[Path, float]], token_ids: list[int], begins: Mapping[Path, int] | None = None
) -> Tensor:
    """Logits [num_tokens, vocab] of one sequence, float32. `begins`: of aLoRA, the first token that each acts on."""
    summed = fresh_base(base, torch.float32)
    for folder, weight in adapters:
        alone = PeftModel.from_pretrained(fresh_base(base, torch.float32), folder).eval()
        wrapped = {n: m for n, m in alone.base_model.model.named_modules() if isinstance(m, BaseTunerLayer)}
        assert wrapped, "the adapter wraps nothing"
        for name, module in wrapped.items():
            begin = (begins or {}).get(folder)
            offsets = {} if begin is None else {"alora_offsets": [len(token_ids) - begin]}
            summed.get_submodule(name).register_forward_hook(_adding(module, weight, offsets))
    with torch.inference_mode():
        return summed(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0].float()


def _adding(module: nn.Module, weight: float, offsets: dict[str, list[int]]) -> Any:
    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + weight * (module(*args, **offsets) - module.base_layer(*args))  # type: ignore[operator]

    return hook
