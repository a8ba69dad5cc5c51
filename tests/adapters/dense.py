"""An adapter applied to a base the plain way: weights changed in a copy, in float32. What a load is compared with.

Independent of the layers that serve adapters: only the formula of adapter_extras.py is here.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from adapters.adapter_extras import TokenRows
from adapters.lora_model import LoRAModel


def applied(model: Any, adapter: LoRAModel) -> Any:
    """A copy of a causal language model whose weights are as the adapter has them."""
    changed, extras = copy.deepcopy(model), adapter.extras
    embedding, head = changed.get_input_embeddings(), changed.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())  # tied no longer
    names = {id(module): name for name, module in changed.named_modules()}
    if extras.embedding is not None:
        weight = _replaced(embedding.weight, extras.embedding.weight, extras.embedding.rows)
        weight = weight * extras.gains.get(names[id(embedding)], torch.ones(1))
        if extras.embedding.lora_a is not None and extras.embedding.lora_b is not None:
            weight = weight + extras.embedding.lora_a @ extras.embedding.lora_b
        embedding.weight = nn.Parameter(weight)
    if extras.head is not None:
        head.weight = nn.Parameter(_replaced(head.weight, extras.head.weight, extras.head.rows))
        if extras.head.bias is not None:
            head.bias = nn.Parameter(extras.head.bias)
    linears = {*adapter.modules, *extras.gains, *extras.input_scales, *extras.biases} - {names[id(embedding)]}
    for name in linears:
        _change_linear(changed.get_submodule(name), name, adapter)
    for name, values in extras.norms.items():
        module, _, which = name.rpartition(".")
        setattr(changed.get_submodule(module), which, nn.Parameter(values.clone()))
    return changed.eval()


def _change_linear(linear: Any, name: str, adapter: LoRAModel) -> None:
    extras, out_features = adapter.extras, linear.weight.shape[0]
    gain = extras.gains.get(name, torch.ones(out_features))
    weight = gain[:, None] * linear.weight.detach()
    weight = weight * extras.input_scales.get(name, torch.ones(linear.weight.shape[1]))
    if name in adapter.modules:
        weight = weight + adapter.modules[name].lora_b.T @ adapter.modules[name].lora_a
    before = torch.zeros(out_features) if linear.bias is None else linear.bias.detach()
    bias = before * gain if name in extras.gain_covers_bias else before
    linear.weight = nn.Parameter(weight)
    linear.bias = nn.Parameter(bias + extras.biases.get(name, torch.zeros(out_features)))


def _replaced(weight: Tensor, whole: Tensor | None, rows: TokenRows | None) -> Tensor:
    """[V', hidden]"""
    changed = weight.detach().clone() if whole is None else whole.clone()
    if rows is not None:
        changed = torch.nn.functional.pad(changed, (0, 0, 0, max(0, int(rows.ids[-1]) + 1 - len(changed))))
        changed[rows.ids] = rows.values
    return changed
