"""What a client may send to the two inference routes: every field with its bounds, and the fields refused by name.

Knows nothing of the loaded model: checks that need its vocabulary or its length stand in server/api/sampling.py.
Types are strict (true and "3" are not ints), floats finite, every int, list and string bounded. An optional field
that is null, "" or [] counts as absent. Unknown fields are ignored; known ones this server cannot honour are refused
unless their value asks for nothing.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from server.api.adapter_choice import AdapterFields
from server.api.unsupported import is_one_of, refuse_unsupported
from server.errors import BadRequest

MAX_TEXT_CHARS = 2**20
MAX_USER_CHARS = 512
MAX_PROMPTS = 128
MAX_CHOICES = 128  # n · prompts
MAX_MESSAGES = 1024
MAX_PARTS = 256
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 300
MAX_LOGPROBS = 20
MAX_TOKENS = 10_000_000
MAX_TEMPLATE_KWARGS = 32
TOKEN_ID_LIMIT = 2**31 - 1
DEFAULT_COMPLETION_TOKENS = 16

_REQUIRED = frozenset({"model", "prompt", "messages"})
_ABSENT: tuple[Any, ...] = (None, "", [])


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True)

    include_usage: bool | None = None


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _logit_bias(value: Any) -> Any:
    """{"50256": -100} → {50256: -100.0}; keys are token ids written as JSON strings."""
    if not isinstance(value, dict):
        return value
    if len(value) > MAX_LOGIT_BIAS:
        raise BadRequest(f"'logit_bias' has {len(value)} entries; the limit is {MAX_LOGIT_BIAS}.", param="logit_bias")
    return {_bias_token(key): _bias(bias) for key, bias in value.items()}


def _bias_token(key: Any) -> int:
    if isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) <= 10 and int(key) <= TOKEN_ID_LIMIT:
        return int(key)
    raise BadRequest("'logit_bias' must map token ids, written as strings of digits, to numbers.", param="logit_bias")


def _bias(value: Any) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and -100 <= value <= 100:
        return float(value)
    raise BadRequest("'logit_bias' values must be numbers from -100 to 100.", param="logit_bias")


TokenId = Annotated[int, Field(ge=0, le=TOKEN_ID_LIMIT)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


class GenerationFields(AdapterFields):
    """What both routes share."""

    max_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS)
    min_tokens: int = Field(0, ge=0, le=MAX_TOKENS)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    top_k: int = Field(0, ge=-1, le=TOKEN_ID_LIMIT)  # 0 and -1 keep every token
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, ge=0.1, le=10)
    logit_bias: Annotated[dict[int, float], BeforeValidator(_logit_bias)] = Field(default_factory=dict)
    n: int = Field(1, ge=1, le=128)  # the server's own limit is HTTPConfig.max_n
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: Annotated[list[StopString], BeforeValidator(_as_list), Field(max_length=MAX_STOPS)] = Field(
        default_factory=list
    )
    stop_token_ids: list[TokenId] = Field(default_factory=list, max_length=MAX_STOP_TOKEN_IDS)
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    user: str | None = Field(None, max_length=MAX_USER_CHARS)
    safety_identifier: str | None = Field(None, max_length=MAX_USER_CHARS)

    @model_validator(mode="before")
    @classmethod
    def _drop_absent(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given = {k: v for k, v in data.items() if k in _REQUIRED or not is_one_of(v, _ABSENT)}
        refuse_unsupported(given)
        return given

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise BadRequest("'stream_options' may only be sent with 'stream': true.", param="stream_options")
        limit = self.max_new_tokens
        if limit is not None and self.min_tokens > limit:
            raise BadRequest(f"'min_tokens' is {self.min_tokens}, over the {limit} of max_tokens.", param="min_tokens")
        return self

    @property
    def max_new_tokens(self) -> int | None:
        """Tokens asked for; None = as many as the route's default allows."""
        return self.max_tokens

    @property
    def sticky_key(self) -> str | None:
        """What an alias's choice stays the same for: the user, else the seed."""
        user = self.safety_identifier or self.user
        return user if user is not None else None if self.seed is None else str(self.seed)

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


Prompts = list[str] | list[list[int]]


def _prompts(value: Any) -> Prompts:
    """The four forms of `prompt` as a list of prompts, all of one kind."""
    if isinstance(value, str):
        return [_text_prompt(value)]
    if not isinstance(value, list):
        raise BadRequest("'prompt' must be a string, a list of strings, or one or more lists of ints.", param="prompt")
    if not value:
        raise BadRequest("'prompt' is empty; send at least one token.", param="prompt")
    if type(value[0]) is int:
        return [_token_prompt(value)]
    if len(value) > MAX_PROMPTS:
        raise BadRequest(f"'prompt' holds {len(value)} prompts; the limit is {MAX_PROMPTS}.", param="prompt")
    if isinstance(value[0], list):
        return [_token_prompt(each) for each in value]
    return [_text_prompt(each) for each in value]


def _text_prompt(value: Any) -> str:
    if not isinstance(value, str):
        raise BadRequest("'prompt' mixes kinds; send only strings or only token ids.", param="prompt")
    if not value:
        raise BadRequest("'prompt' is empty; send at least one token.", param="prompt")
    if len(value) > MAX_TEXT_CHARS:
        raise BadRequest(f"'prompt' has {len(value)} characters; the limit is {MAX_TEXT_CHARS}.", param="prompt")
    return value


def _token_prompt(value: Any) -> list[int]:
    if not isinstance(value, list):
        raise BadRequest("'prompt' mixes kinds; send only strings or only token ids.", param="prompt")
    if not value:
        raise BadRequest("'prompt' is empty; send at least one token.", param="prompt")
    if any(type(each) is not int or not 0 <= each <= TOKEN_ID_LIMIT for each in value):
        raise BadRequest("'prompt' must hold token ids, ints from 0 on.", param="prompt")
    return value


class CompletionRequest(GenerationFields):
    """POST /v1/completions."""

    prompt: Annotated[list[Any], BeforeValidator(_prompts)]  # Prompts
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = Field(None, ge=1, le=128)
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _check_best_of(self) -> Self:
        if self.best_of is not None and self.best_of != self.n:
            raise BadRequest(
                f"'best_of' is {self.best_of} and 'n' is {self.n}; this server returns every choice it makes, "
                "so they must be equal.",
                param="best_of",
            )
        if len(self.prompt) * self.n > MAX_CHOICES:
            raise BadRequest(
                f"{len(self.prompt)} prompts with n {self.n} are over the limit of {MAX_CHOICES} choices.", param="n"
            )
        return self

    @property
    def prompts(self) -> Prompts:
        return self.prompt


class TextPart(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True)

    type: Literal["text"]
    text: str = Field(max_length=MAX_TEXT_CHARS)


def _parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class ChatMessage(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True)

    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: Annotated[list[TextPart], BeforeValidator(_parts), Field(max_length=MAX_PARTS)]
    name: str | None = Field(None, max_length=64)

    @model_validator(mode="before")
    @classmethod
    def _refuse_calls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name in ("tool_calls", "function_call", "audio"):
            if not is_one_of(data.get(name), _ABSENT):
                raise BadRequest(f"'messages': '{name}' is not supported by this server.", param="messages")
        if data.get("role") == "assistant" and data.get("content") is None:
            return {**data, "content": ""}
        return data

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates expect it; they know 'system', not OpenAI's newer 'developer'."""
        role = "system" if self.role == "developer" else self.role
        named = {} if self.name is None else {"name": self.name}
        if len(self.content) == 1:
            return {"role": role, "content": self.content[0].text, **named}
        return {"role": role, "content": [part.model_dump() for part in self.content], **named}


def _few_messages(value: Any) -> Any:
    """Counts before any message is looked at."""
    if isinstance(value, list) and len(value) > MAX_MESSAGES:
        raise BadRequest(f"'messages' holds {len(value)} messages; the limit is {MAX_MESSAGES}.", param="messages")
    return value


def _template_kwargs(value: Any) -> Any:
    """Names and kinds are checked against the template by server.tokenizer; here only the number and length."""
    if not isinstance(value, dict):
        return value
    too_long = any(len(key) > 64 or (isinstance(each, str) and len(each) > 1024) for key, each in value.items())
    if len(value) > MAX_TEMPLATE_KWARGS or too_long:
        raise BadRequest(
            f"'chat_template_kwargs' takes at most {MAX_TEMPLATE_KWARGS} entries, names of 64 characters and values "
            "of 1024.",
            param="chat_template_kwargs",
        )
    return value


class ChatRequest(GenerationFields):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], BeforeValidator(_few_messages)] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: Annotated[dict[str, Any], BeforeValidator(_template_kwargs)] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _refuse_echo(cls, data: Any) -> Any:
        for name in ("echo", "add_special_tokens"):
            if isinstance(data, dict) and not is_one_of(data.get(name), (None, False)):
                raise BadRequest(f"'{name}' is only supported by /v1/completions.", param=name)
        return data

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise BadRequest("'top_logprobs' may only be sent with 'logprobs': true.", param="top_logprobs")
        return self

    @property
    def max_new_tokens(self) -> int | None:
        """The newer field wins where both are sent."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None
