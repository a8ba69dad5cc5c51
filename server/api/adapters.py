"""Our own routes for adapters: list, describe, load, unload. vLLM's dialect of the same is in server/api/vllm.py.

Knows nothing of files or weights. Every refusal carries, beside OpenAI's four keys, what was found at fault.
"""

from typing import Annotated, Any

from fastapi import Depends, Response
from pydantic import BaseModel, ConfigDict, Field, model_validator

from adapters.errors import AdapterRefused
from adapters.registry import AdapterState
from server.api.auth import Role, role_router
from server.api.context import ServerContext, server_context
from server.api.error_handlers import error_body, error_reply

router = role_router(Role.ADMIN)

Context = Annotated[ServerContext, Depends(server_context)]

MAX_SOURCE_CHARS = 4096


class AdminFields(BaseModel):
    """The body of an admin route: strict types; a field that is null counts as absent."""

    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_null(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


class LoadAdapterRequest(AdminFields):
    """POST /v1/adapters."""

    name: str = Field(min_length=1, max_length=512)
    source: str = Field(min_length=1, max_length=MAX_SOURCE_CHARS)
    load_inplace: bool = False


def refusal_body(error: AdapterRefused, *, error_type: str = "invalid_request_error") -> dict[str, Any]:
    """OpenAI's four keys and, for programs, what was refused: feature, tensor, why and fix."""
    body = error_body(str(error), error_type=error_type, code=error.code)
    body["error"] |= {"feature": error.feature, "tensor": error.tensor, "why": error.why, "fix": error.fix}
    return body


@router.get("/v1/adapters")
async def list_adapters(context: Context) -> dict[str, Any]:
    """Every name, then the versions that drain."""
    return {"object": "list", "data": [adapter.to_dict() for adapter in context.adapters.list()]}


@router.post("/v1/adapters", status_code=201, response_model=None)
async def load_adapter(body: LoadAdapterRequest, context: Context, response: Response) -> dict[str, Any] | Response:
    """201 when the name is new, 200 when it was there (replaced or unchanged)."""
    try:
        load = await context.adapters.load_reporting(body.name, body.source, load_inplace=body.load_inplace)
    except AdapterRefused as error:
        return error_reply(context.metrics, error.status, refusal_body(error))
    response.status_code = 201 if load.outcome == "loaded" else 200
    return {**context.adapters.describe(load.ref.name).to_dict(), "outcome": load.outcome}


@router.get("/v1/adapters/{name:path}")
async def describe_adapter(name: str, context: Context) -> dict[str, Any]:
    return context.adapters.describe(name).to_dict()


@router.delete("/v1/adapters/{name:path}")
async def unload_adapter(name: str, context: Context) -> dict[str, Any]:
    """The name is gone when this returns; `state` is draining while only requests still hold the version."""
    ref = await context.adapters.unload(name)
    held_by = [info.state for info in context.adapters.registry.list() if info.ref.version == ref.version]
    state = "draining" if held_by and AdapterState.READY not in held_by else "unloaded"
    return {"object": "adapter", "name": ref.name, "version": ref.version, "state": state, "deleted": True}
