"""How both routes answer: a stream of chunks, or one reply when all is there. Either way the generation is closed.

Knows nothing of what a reply or a chunk looks like; the route's writer does.
"""

from collections.abc import AsyncIterator
from typing import Any, Protocol

from fastapi import Request
from starlette.responses import JSONResponse, Response

from server.api.disconnect import run_while_connected
from server.api.generation import ChoiceResult, Generation, collect
from server.api.replies import adapter_headers
from server.api.sse import CountError, SSEResponse


class Writer(Protocol):
    """One request's choices in the shape of its route."""

    def events(self) -> AsyncIterator[bytes]: ...

    def reply(self, results: list[ChoiceResult]) -> dict[str, Any]: ...


async def answer(
    request: Request, generation: Generation, writer: Writer, *, is_stream: bool, count_error: CountError
) -> Response:
    """Raises ClientGone when the client leaves before a whole reply; a stream looks after that itself."""
    headers = adapter_headers(generation.hold)
    if is_stream:
        return SSEResponse(writer.events(), close=generation.close, count_error=count_error, headers=headers)
    try:
        results = await run_while_connected(request.receive, collect(generation))
    finally:
        generation.close()
    return JSONResponse(writer.reply(results), headers=headers)
