"""Fields of OpenAI's API and of other servers that are refused by name, never silently ignored.

Knows nothing of the fields that are honoured (server/api/protocol.py). A value that asks for nothing is let through.
"""

from collections.abc import Mapping
from typing import Any

from server.errors import BadRequest

_USE_MODEL = "name the adapter in 'model' or 'adapters'"
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": (),
    "cache_salt": (),
    "chat_template": (),
    "documents": (),
    "function_call": ("none", "auto"),
    "functions": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "length_penalty": (1, 1.0),
    "logits_processors": (),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "priority": (0,),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "return_tokens_as_token_ids": (False,),
    "service_tier": ("auto", "default"),
    "structured_outputs": (),
    "suffix": (),
    "tool_choice": ("none", "auto"),
    "tools": (),
    "truncate_prompt_tokens": (-1,),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Fields of OpenAI's API and of other servers that are not honoured here → the values that ask for nothing."""

_DIALECTS: Mapping[str, str] = {
    "adapter_id": _USE_MODEL,
    "adapter_source": _USE_MODEL,
    "lora_path": _USE_MODEL,
    "merged_adapters": _USE_MODEL,
}
"""Other servers' ways to choose an adapter → what to do instead. Ignoring one would answer with the wrong weights."""


def is_one_of(value: Any, values: tuple[Any, ...]) -> bool:
    """Equality that keeps apart what Python does not: True and 1, False and 0."""
    return any(type(value) is type(each) and value == each for each in values)


def refuse_unsupported(given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if name in _NEUTRAL and not is_one_of(value, _NEUTRAL[name]):
            raise BadRequest(f"'{name}' is not supported by this server with this value; leave it out.", param=name)
        if name in _DIALECTS:
            raise BadRequest(f"'{name}' is not supported by this server; {_DIALECTS[name]}.", param=name)
