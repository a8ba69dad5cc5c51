"""adapter_config.json of an adapter that had none: every scale is in B already. Knows nothing of where it came from."""

from collections.abc import Mapping

from adapters.convert.scale_rule import fields_of_scale_one


def new_config(base_name: str, ranks: Mapping[str, int]) -> dict[str, object]:
    """`ranks` by module as the tensors call it."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(ranks),
        **fields_of_scale_one(ranks),
    }
