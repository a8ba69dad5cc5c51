"""Which class of transformers builds a base, and what adapters may change in it. Builds nothing, knows no adapters."""

from dataclasses import replace
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from adapters.base_walk import modules_of
from adapters.module_names import BaseModules
from server.engine.checkpoint_names import checkpoint_namer


def auto_class(config: PreTrainedConfig) -> type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]:
    """The auto class that knows `config`: some models with a vision tower are no causal LM to transformers, though
    their text side is one. A config neither knows is left to the first, whose message names it."""
    if type(config) not in AutoModelForCausalLM._model_mapping and (
        type(config) in AutoModelForImageTextToText._model_mapping
    ):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def from_config(config: PreTrainedConfig, **settings: Any) -> PreTrainedModel:
    model = auto_class(config).from_config(config, **settings)  # type: ignore[no-untyped-call]
    assert isinstance(model, PreTrainedModel)
    return model


def outline_of(model: PreTrainedModel) -> BaseModules:
    return replace(modules_of(model), checkpoint_name=checkpoint_namer(model))
