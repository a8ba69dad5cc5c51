"""loralib's layers as its paper's code computes them, written anew with torch: what a converted checkpoint must equal.

Each takes the place of a module of a base that transformers built, and names its parameters as loralib does.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class _Frozen(nn.Module):
    """The base's weight [out, in] and bias, whichever way round the base stores it."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            module.weight.data.T.clone() if hasattr(module, "nx") else module.weight.data.clone()
        )
        self.bias = None if getattr(module, "bias", None) is None else nn.Parameter(module.bias.data.clone())


class Linear(_Frozen):
    def __init__(self, module: Any, r: int, alpha: float) -> None:
        super().__init__(module)
        out_features, in_features = self.weight.shape
        self.lora_A = nn.Parameter(torch.randn(r, in_features) * 0.1)
        self.lora_B = nn.Parameter(torch.randn(out_features, r) * 0.1)
        self.scaling = alpha / r

    def forward(self, x: Tensor) -> Tensor:
        result = functional.linear(x, self.weight, self.bias)
        return result + (x @ self.lora_A.T @ self.lora_B.T) * self.scaling


class MergedLinear(_Frozen):
    def __init__(self, module: Any, r: int, alpha: float, enable_lora: tuple[bool, ...]) -> None:
        super().__init__(module)
        out_features, in_features = self.weight.shape
        self.enable_lora = enable_lora
        self.lora_A = nn.Parameter(torch.randn(r * sum(enable_lora), in_features) * 0.1)
        self.lora_B = nn.Parameter(torch.randn(out_features // len(enable_lora) * sum(enable_lora), r) * 0.1)
        self.scaling = alpha / r
        self.lora_ind = torch.zeros(out_features, dtype=torch.bool).view(len(enable_lora), -1)
        self.lora_ind[torch.tensor(enable_lora)] = True
        self.lora_ind = self.lora_ind.view(-1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.lora_A.unsqueeze(0), self.lora_B.unsqueeze(-1)
        delta = functional.conv1d(a, b, groups=sum(self.enable_lora)).squeeze(0)
        padded = x.new_zeros(len(self.lora_ind), delta.shape[1])
        padded[self.lora_ind] = delta
        return functional.linear(x, self.weight, self.bias) + functional.linear(x, padded) * self.scaling


class Embedding(nn.Module):
    def __init__(self, module: nn.Embedding, r: int, alpha: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(module.weight.data.clone())
        self.lora_A = nn.Parameter(torch.randn(r, module.num_embeddings) * 0.1)
        self.lora_B = nn.Parameter(torch.randn(module.embedding_dim, r) * 0.1)
        self.scaling = alpha / r

    def forward(self, x: Tensor) -> Tensor:
        after_a = functional.embedding(x, self.lora_A.transpose(0, 1))
        return functional.embedding(x, self.weight) + (after_a @ self.lora_B.transpose(0, 1)) * self.scaling


def lora_state_dict(model: nn.Module, bias: str = "none") -> dict[str, Tensor]:
    """loralib's: `lora_` alone, with all biases, or with those of layers that have LoRA."""
    state = model.state_dict()
    chosen = {name: tensor for name, tensor in state.items() if "lora_" in name}
    if bias == "all":
        chosen |= {name: tensor for name, tensor in state.items() if name.endswith("bias")}
    elif bias == "lora_only":
        owners = {name.split("lora_")[0] for name in chosen}
        chosen |= {f"{owner}bias": state[f"{owner}bias"] for owner in owners if f"{owner}bias" in state}
    return {name: tensor.clone() for name, tensor in chosen.items()}
