"""The outputs of one admitted request, as the event loop reads them. Knows nothing of threads or of the engine."""

import asyncio
from collections.abc import AsyncIterator, Callable

from server.engine.request import Request, RequestOutput


class RequestStream:
    """The outputs of one admitted request, ending after the terminal one. `abort` may be called at any time."""

    def __init__(self, request: Request, abort: Callable[[str], None]) -> None:
        self.request = request
        self._abort = abort
        self._outputs: asyncio.Queue[RequestOutput] = asyncio.Queue()
        self._is_finished = False  # the terminal output arrived
        self._is_exhausted = False  # … and was read

    def put(self, output: RequestOutput) -> None:
        if self._is_finished:
            raise RuntimeError(f"request {output.request_id} already ended; a second terminal output is a fault")
        self._is_finished = output.finish_reason is not None
        self._outputs.put_nowait(output)

    def abort(self) -> None:
        if not self._is_finished:
            self._abort(self.request.request_id)

    def __aiter__(self) -> AsyncIterator[RequestOutput]:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._is_exhausted:
            raise StopAsyncIteration
        output = await self._outputs.get()
        self._is_exhausted = output.finish_reason is not None
        return output
