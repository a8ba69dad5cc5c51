"""One server-sent event as bytes: any payload, or a payload of which all but one text is written beforehand.

Knows nothing of what payloads say, nor of how events are sent.
"""

import json
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from fastapi.sse import format_sse_event

_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def event(payload: Mapping[str, Any]) -> bytes:
    return format_sse_event(data_str=_JSON.encode(payload))


def named_event(name: str, payload: Mapping[str, Any]) -> bytes:
    return format_sse_event(data_str=_JSON.encode(payload), event=name)


class EventTemplate:
    """The events that `event(make(text))` gives, for any text; `make` is asked once and uses the text once."""

    def __init__(self, make: Callable[[str], Mapping[str, Any]]) -> None:
        mark = uuid.uuid4().hex  # no client can have sent it, so it stands where the text stands and nowhere else
        self._before, self._after = event(make(mark)).split(f'"{mark}"'.encode())

    def event(self, text: str) -> bytes:
        return self._before + _JSON.encode(text).encode() + self._after
