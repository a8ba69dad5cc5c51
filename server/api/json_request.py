"""A request whose JSON body was read whole, within a limit, before anything looks inside.

Knows nothing of fields. Refuses what a lenient parser lets through: NaN and infinities (1e999 too, when it reaches a
field), nesting past 200 levels, more than `MAX_JSON_NODES` lists, objects and keys, integers past 4300 digits, lone
surrogates, compressed bodies, other content types.
"""

import asyncio
import re
from collections.abc import AsyncIterator
from email.message import Message
from typing import Any, Self

import pydantic_core
from starlette.requests import ClientDisconnect, Request

from server.api.disconnect import ClientGone
from server.errors import BadRequest, BodyTooLarge, BodyTooSlow

MAX_JSON_NODES = 32_768
"""Lists, objects and keys of one body. Each costs memory to track: a megabyte of "[7],[7],…" would hold up the event
loop, and every stream on it, for as long as a thousand tokens take."""

STALL_SECONDS = 10.0  # between two pieces of a body; a client that sends nothing for so long holds a place for nothing

_JSON_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


class JSONRequest(Request):
    """Carries the parsed body, so that FastAPI's own `await request.json()` finds it done."""

    @classmethod
    async def read(cls, request: Request, *, max_bytes: int) -> Self:
        """Read and parse; raise BodyTooLarge as soon as the size is known, BodyTooSlow, ClientGone, or BadRequest."""
        _check_headers(request, max_bytes)
        body = await _read_body(request, max_bytes)
        parsed = cls(request.scope, request.receive)
        parsed._body = body
        parsed._json = parse_json(body) if body else None
        return parsed

    async def json(self) -> Any:
        return self._json


def parse_json(body: bytes) -> Any:
    """The value of a JSON document; its text is never repeated in the error."""
    if _count_nodes(body) > MAX_JSON_NODES and _count_nodes(_JSON_STRING.sub(b"", body)) > MAX_JSON_NODES:
        raise BadRequest(f"The request body has more than {MAX_JSON_NODES} JSON lists, objects and keys.")
    try:
        return pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise BadRequest(f"The request body is not valid JSON: {error}.") from error


def _count_nodes(body: bytes) -> int:
    """At least the number of lists, objects and keys; exactly it when the body's strings are cut out."""
    return body.count(b"[") + body.count(b"{") + body.count(b":")


def _check_headers(request: Request, max_bytes: int) -> None:
    refuse_compressed(request)
    if not _is_json(request.headers.get("content-type", "")):
        raise BadRequest("The request body must be JSON; send the header 'Content-Type: application/json'.")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise _too_large(max_bytes)


def refuse_compressed(request: Request) -> None:
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise BadRequest("Compressed request bodies are not accepted; send the body without Content-Encoding.")


def _is_json(content_type: str) -> bool:
    message = Message()
    message["content-type"] = content_type
    subtype = message.get_content_subtype()
    return message.get_content_maintype() == "application" and (subtype == "json" or subtype.endswith("+json"))


async def _read_body(request: Request, max_bytes: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    async for chunk in body_chunks(request):
        size += len(chunk)
        if size > max_bytes:
            raise _too_large(max_bytes)
        chunks.append(chunk)
    return b"".join(chunks)


async def body_chunks(request: Request) -> AsyncIterator[bytes]:
    """The body as it comes. Raises ClientGone when it is cut off, BodyTooSlow when it stops coming."""
    stream = request.stream()
    try:
        while (chunk := await _next_chunk(stream)) is not None:
            yield chunk
    except ClientDisconnect as error:
        raise ClientGone from error


async def _next_chunk(stream: AsyncIterator[bytes]) -> bytes | None:
    try:
        async with asyncio.timeout(STALL_SECONDS):
            return await anext(stream, None)
    except TimeoutError as error:
        raise BodyTooSlow(f"Nothing of the request body came for {STALL_SECONDS:g} seconds; send it again.") from error


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"The request body is larger than {max_bytes} bytes, the limit of this server.")
