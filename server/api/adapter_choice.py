"""Which adapters a request names, and with what weights: the forms that `model`, `adapters` and `lora` may have.

    "model": "sql"                          one adapter, or the base model
    "model": "sql@0.7"                      … with a weight
    "model": "base:sql@0.7+tone@0.3"        several
    "adapters": [{"name": "sql", "weight": 0.7}]          beside a `model` that names the base
    "lora": [{"id": 0, "scale": 0.7}]       the same in llama.cpp's words; an id is a name or a place in --lora-modules

Knows no adapter and takes no lease. All kinds of names may hold '@', so a text may be read in more than one way; which
way is right is settled where names are looked up (server/api/leasing.py). Raises BadRequest.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from server.errors import BadRequest

MAX_MODEL_CHARS = 512
MAX_ADAPTERS = 8  # of one request
MAX_WEIGHT = 16.0

_WEIGHTED = re.compile(r"(.+)@(-?[0-9]{1,2}(?:\.[0-9]{1,6})?)", re.DOTALL)

_Name = Annotated[str, Field(min_length=1, max_length=MAX_MODEL_CHARS)]
_Weight = Annotated[float, Field(ge=-MAX_WEIGHT, le=MAX_WEIGHT)]
_STRICT = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, hide_input_in_errors=True)


class WeightedAdapter(BaseModel):
    model_config = _STRICT

    name: _Name
    weight: _Weight = 1.0


class ScaledLoRA(BaseModel):
    model_config = _STRICT

    id: _Name | Annotated[int, Field(ge=0, le=2**31 - 1)]
    scale: _Weight


class AdapterFields(BaseModel):
    """The fields of both routes that say which weights answer."""

    model_config = _STRICT

    model: _Name
    adapters: list[WeightedAdapter] = Field(default_factory=list, max_length=MAX_ADAPTERS)
    lora: list[ScaledLoRA] = Field(default_factory=list, max_length=MAX_ADAPTERS)


@dataclass(frozen=True, slots=True)
class Reading:
    """One way to read a text: an adapter's name, or all else that `model` may say, and a weight if one is meant."""

    name: str
    weight: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterChoice:
    """Each part is read in the first of its ways that leads to something. `base` must then name the base model."""

    parts: tuple[tuple[Reading, ...], ...]
    param: str = "model"  # the field that named them
    base: str | None = None


def adapter_choice(fields: AdapterFields, *, modules: Sequence[str] = (), bases: Sequence[str] = ()) -> AdapterChoice:
    """`modules` are the names given at start, `bases` the base model's."""
    if fields.adapters and fields.lora:
        raise BadRequest("'adapters' and 'lora' exclude each other; name every adapter in one of them.", param="lora")
    if fields.adapters:
        named = tuple((Reading(each.name, each.weight),) for each in fields.adapters)
        return AdapterChoice(parts=named, param="adapters", base=fields.model)
    if fields.lora:
        scaled = tuple((Reading(_name_of(each.id, modules), each.scale),) for each in fields.lora)
        return AdapterChoice(parts=scaled, param="lora", base=fields.model)
    return AdapterChoice(parts=_parts_of(fields.model, bases))


def _name_of(lora_id: str | int, modules: Sequence[str]) -> str:
    if isinstance(lora_id, str):
        return lora_id
    if lora_id < len(modules):
        return modules[lora_id]
    raise BadRequest(
        f"'lora' holds the id {lora_id}, and --lora-modules named {len(modules)} adapters at start, counted from 0; "
        "use an adapter's name as the id.",
        param="lora",
    )


def _parts_of(model: str, bases: Sequence[str]) -> tuple[tuple[Reading, ...], ...]:
    if "+" not in model or model in bases:
        return (_readings(model),)
    # Only the base's names may hold '+'; the one before the colon is no list of adapters.
    before = max((f"{base}:" for base in bases if model.startswith(f"{base}:")), key=len, default="")
    pieces = model.removeprefix(before).split("+")
    if not all(pieces):
        raise BadRequest(
            "'model' names nothing before or after a '+'; it joins adapters, as in a@0.7+b.", param="model"
        )
    if len(pieces) > MAX_ADAPTERS:
        raise BadRequest(f"'model' joins {len(pieces)} adapters; the limit is {MAX_ADAPTERS}.", param="model")
    return tuple(_readings(piece) for piece in (before + pieces[0], *pieces[1:]))


def _readings(text: str) -> tuple[Reading, ...]:
    weighted = _WEIGHTED.fullmatch(text) if "@" in text else None
    if weighted is None:
        return (Reading(text),)
    return Reading(text), Reading(weighted[1], float(weighted[2]))
