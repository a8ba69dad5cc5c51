"""POST /v1/adapters/upload: an adapter's files in one multipart request, kept on the server and loaded from there.

Knows nothing of multipart; the upload store reads the body as it comes.
"""

from typing import Annotated

from fastapi import Depends, Query, Request
from starlette.responses import Response

from adapters.read_options import ReadOptions
from server.api.adapters import MAX_PRIORITY, MAX_TTL_SECONDS, Wait, loading_reply
from server.api.auth import Role, role_router
from server.api.context import ServerContext, server_context
from server.api.json_request import body_chunks, refuse_compressed

router = role_router(Role.ADMIN)


@router.post("/v1/adapters/upload")
async def upload_adapter(
    request: Request,
    context: Annotated[ServerContext, Depends(server_context)],
    name: Annotated[str, Query(min_length=1, max_length=512)],
    load_inplace: bool = False,
    pin: bool | None = None,
    ttl: Annotated[float | None, Query(gt=0, le=MAX_TTL_SECONDS)] = None,
    priority: Annotated[int | None, Query(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = None,
    ignore: Annotated[list[str] | None, Query()] = None,
    moe_lora_b_layout: str | None = None,
    wait: Wait = 0.0,
) -> Response:
    """The replies of POST /v1/adapters. Name and options are checked before the body is read."""
    context.adapters.check_name(name)
    options = ReadOptions(ignore=tuple(ignore or ()), moe_lora_b_layout=moe_lora_b_layout)
    refuse_compressed(request)
    upload = await context.uploads.receive(request.headers.get("content-type", ""), body_chunks(request))
    wanted = context.adapters.changes.asked(
        name, upload.source, load_inplace=load_inplace, pin=pin, ttl=ttl, priority=priority, options=options
    )
    return await loading_reply(context, request, await context.adapters.submit(wanted), wait)
