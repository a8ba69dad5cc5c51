"""A reply that lists thousands of things, made in small steps between which the event loop serves others."""

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from starlette.responses import Response

_PER_TURN = 32

_Item = TypeVar("_Item")


async def json_list(items: Sequence[_Item], to_dict: Callable[[_Item], dict[str, Any]]) -> Response:
    """OpenAI's list object: {"object":"list","data":[...]}."""
    parts: list[str] = []
    for at, item in enumerate(items):
        if at % _PER_TURN == 0:
            await asyncio.sleep(0)
        parts.append(json.dumps(to_dict(item), ensure_ascii=False, allow_nan=False, separators=(",", ":")))
    body = f'{{"object":"list","data":[{",".join(parts)}]}}'
    return Response(body.encode(), media_type="application/json")
