"""Our own routes for adapters: load, list and watch, describe, change, validate, roll back, unload.

vLLM's dialect of loading is in server/api/vllm.py, aliases in server/api/aliases.py, uploads in server/api/uploads.py.
Knows nothing of files or weights.
"""

from collections.abc import AsyncIterator
from enum import StrEnum
from typing import Annotated, Any

from fastapi import Depends, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.responses import JSONResponse

from adapters.errors import AdapterNotFound
from adapters.read_options import ReadOptions
from server.api.adapter_stream import AdapterStream
from server.api.auth import Role, role_router
from server.api.context import ServerContext, server_context
from server.api.disconnect import run_while_connected
from server.api.event import named_event
from server.api.json_list import json_list
from server.api.sse import SSEResponse
from server.lifecycle.adapter_description import AdapterDescription, unloaded
from server.lifecycle.adapter_events import AdapterChanges
from server.lifecycle.load_job import LoadJob, LoadOutcome, wait_at_most
from server.lifecycle.sources.source_options import with_options

router = role_router(Role.ADMIN)

Context = Annotated[ServerContext, Depends(server_context)]

MAX_SOURCE_CHARS = 4096
MAX_WAIT_SECONDS = 600.0
MAX_TTL_SECONDS = 10 * 365 * 24 * 3600.0
MAX_PRIORITY = 1_000_000

Wait = Annotated[float, Query(ge=0, le=MAX_WAIT_SECONDS)]
Deadline = Annotated[float | None, Query(ge=0, le=MAX_WAIT_SECONDS)]
Priority = Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)]


class UnloadMode(StrEnum):
    DRAIN = "drain"
    ABORT = "abort"


class AdminFields(BaseModel):
    """The body of an admin route: strict types; a field that is null counts as absent."""

    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_null(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


class SourceFields(AdminFields):
    """A source, and the load options, which it may also carry itself (`source#ignore=…`)."""

    source: str = Field(min_length=1, max_length=MAX_SOURCE_CHARS)
    ignore: list[str] = Field(default_factory=list)
    moe_lora_b_layout: str | None = None

    @property
    def options(self) -> ReadOptions:
        """Raises AdapterOptionInvalid."""
        return ReadOptions(ignore=tuple(self.ignore), moe_lora_b_layout=self.moe_lora_b_layout)


class LoadAdapterRequest(SourceFields):
    """POST /v1/adapters; a setting that is absent stays as the name has it."""

    name: str = Field(min_length=1, max_length=512)
    load_inplace: bool = False
    pin: bool | None = None
    ttl: float | None = Field(None, gt=0, le=MAX_TTL_SECONDS)  # seconds
    priority: Priority | None = None


class ChangeAdapterRequest(AdminFields):
    """PATCH /v1/adapters/{name}; what is absent stays as it is. A ttl of 0 means for ever."""

    pin: bool | None = None
    ttl: float | None = Field(None, ge=0, le=MAX_TTL_SECONDS)
    priority: Priority | None = None


@router.get("/v1/adapters", response_model=None)
async def list_adapters(context: Context, watch: bool = False) -> Response:
    """Every name, then the versions that drain; with `watch` a stream: all of them, then each as it changes."""
    if not watch:
        return await json_list([adapter async for adapter in context.adapters.view.each()], AdapterDescription.to_dict)
    changes = context.adapters.events.changes()
    return SSEResponse(_watched(context, changes), close=changes.close, count_error=context.metrics.error, headers={})


async def _watched(context: ServerContext, changes: AdapterChanges) -> AsyncIterator[bytes]:
    """`adapter` events with the description; of what is gone, one whose state is `unloaded`."""
    stream = AdapterStream(context.adapters.view)
    async for adapter in context.adapters.view.each():
        yield named_event("adapter", stream.first(adapter))
    while (name := await changes.next()) is not None:
        for described in stream.changed(name):
            yield named_event("adapter", described)


@router.post("/v1/adapters", response_model=None)
async def load_adapter(body: LoadAdapterRequest, request: Request, context: Context, wait: Wait = 0.0) -> Response:
    """202 when it was accepted; with `wait` seconds, 201 when the name was new and 200 when it was there (replaced or
    unchanged), or 202 after all when that takes longer.
    """
    settings = body.model_dump(exclude={"ignore", "moe_lora_b_layout"})
    wanted = context.adapters.changes.asked(**settings, options=body.options)
    return await loading_reply(context, request, await context.adapters.submit(wanted), wait)


def _described(context: ServerContext, name: str) -> dict[str, Any]:
    try:
        return context.adapters.view.describe(name).to_dict()
    except AdapterNotFound:  # meanwhile
        return unloaded(name)


async def loading_reply(context: ServerContext, request: Request, job: LoadJob, wait: float) -> Response:
    """What is known of a load after `wait` seconds. Raises what went wrong, and ClientGone; the load goes on."""
    load = await run_while_connected(request.receive, wait_at_most(job, wait)) if wait else None
    name = job.wanted.name
    if load is None:
        return JSONResponse(_described(context, name), status_code=202)
    status = 201 if load.outcome is LoadOutcome.LOADED else 200
    return JSONResponse({**_described(context, name), "outcome": load.outcome.value}, status_code=status)


@router.post("/v1/adapters/{name:path}/validate")
async def validate_adapter(name: str, body: SourceFields, request: Request, context: Context) -> dict[str, Any]:
    """Whether the adapter would be served under the name, read and checked to the end; nothing is kept."""
    context.adapters.check_name(name)
    source = with_options(body.source, body.options)
    loaded = await run_while_connected(request.receive, context.adapters.loader.validate(source))
    return {"object": "adapter.validation", "ok": True, "version": loaded.model.version, **loaded.report.to_dict()}


@router.post("/v1/adapters/{name:path}/rollback")
async def roll_back_adapter(name: str, context: Context) -> dict[str, Any]:
    await context.adapters.changes.rollback(name)
    return context.adapters.view.describe(name).to_dict()


@router.get("/v1/adapters/{name:path}")
async def describe_adapter(name: str, context: Context) -> dict[str, Any]:
    return context.adapters.view.describe(name).to_dict()


@router.patch("/v1/adapters/{name:path}")
async def change_adapter(name: str, body: ChangeAdapterRequest, context: Context) -> dict[str, Any]:
    await context.adapters.changes.change(name, pin=body.pin, ttl=body.ttl, priority=body.priority)
    return context.adapters.view.describe(name).to_dict()


@router.delete("/v1/adapters/{name:path}", response_model=None)
async def unload_adapter(
    name: str, context: Context, mode: UnloadMode = UnloadMode.DRAIN, deadline: Deadline = None
) -> Response:
    """The name is gone when this returns: 200 and the bytes freed, or 202 while requests still hold the version."""
    unloaded = await context.adapters.unload(name, abort=mode is UnloadMode.ABORT, deadline=deadline)
    return JSONResponse(unloaded.to_dict(), status_code=202 if unloaded.is_draining else 200)
