"""The oracle: PEFT, one adapter on one fresh model, and transformers' own forward for the base. Nothing of ours."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM


def fresh_base(folder: Path, dtype: torch.dtype) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def make_adapter(base: Path, out: Path, *, seed: int, std: float = 0.05, **config: object) -> Path:
    """A PEFT folder whose A and B are both random: PEFT's own B = 0 would make every test pass."""
    model = get_peft_model(fresh_base(base, torch.float32), LoraConfig(task_type="CAUSAL_LM", **config))  # type: ignore[arg-type]
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=std)
    model.save_pretrained(out)
    return out


def logits(base: Path, adapter: Path | None, token_ids: list[int], dtype: torch.dtype) -> Tensor:
    """Logits [num_tokens, vocab] of one sequence, as float32, on a model made for this call."""
    model = fresh_base(base, dtype)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.inference_mode():
        return model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0].float()


def weighted_logits(base: Path, adapters: list[tuple[Path, float]], token_ids: list[int]) -> Tensor:
    """Logits [num_tokens, vocab] of PEFT with several adapters active at once, each scaled by its weight."""
    names = [f"a{i}" for i in range(len(adapters))]
    model = PeftModel.from_pretrained(fresh_base(base, torch.float32), adapters[0][0], adapter_name=names[0])
    for name, (folder, _) in zip(names[1:], adapters[1:], strict=True):
        model.load_adapter(folder, adapter_name=name)
    model.base_model.set_adapter(names)
    for module in model.modules():
        for name, (_, weight) in zip(names, adapters, strict=True):
            if hasattr(module, "lora_A") and name in getattr(module, "scaling", {}):
                module.scaling[name] *= weight
    with torch.inference_mode():
        return model.eval()(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0].float()
