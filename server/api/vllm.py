"""vLLM's routes to load and unload adapters: its fields, statuses, messages and plain-text replies, for the operators
and trainers that call them.

Two differences. The same bytes under the same name again answer 200, and what cannot be served answers 400 with our
code, not 500. Errors carry `message` at the top level too, where older callers look for it.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import Depends
from pydantic import Field
from starlette.responses import PlainTextResponse, Response

from adapters.errors import AdapterAlreadyLoaded, AdapterError, AdapterNotFound
from server.api.adapters import MAX_SOURCE_CHARS, AdminFields
from server.api.auth import Role, role_router
from server.api.context import ServerContext, server_context
from server.api.error_handlers import adapter_error_body, adapter_error_headers, error_body, error_reply

router = role_router(Role.ADMIN)

Context = Annotated[ServerContext, Depends(server_context)]

_INVALID, _NOT_FOUND, _SERVER = "InvalidUserInput", "NotFoundError", "InternalServerError"


class LoadLoRAAdapterRequest(AdminFields):
    lora_name: str = Field("", max_length=512)
    lora_path: str = Field("", max_length=MAX_SOURCE_CHARS)
    load_inplace: bool = False
    is_3d_lora_weight: bool = False


class UnloadLoRAAdapterRequest(AdminFields):
    """`lora_int_id` is vLLM's internal number; it is accepted and says nothing here."""

    lora_name: str = Field("", max_length=512)
    lora_int_id: int | None = None


@router.post("/v1/load_lora_adapter", response_model=None)
async def load_lora_adapter(body: LoadLoRAAdapterRequest, context: Context) -> Response:
    name = body.lora_name
    if not name or not body.lora_path:
        return _error(context, 400, "Both 'lora_name' and 'lora_path' must be provided.")
    if name in context.adapters.names.base_names:
        return _error(context, 400, f"The lora adapter '{name}' conflicts with a served base model.")
    if body.is_3d_lora_weight:
        return _error(context, 400, "'is_3d_lora_weight' is not supported; weights are one matrix pair per module.")
    try:
        await context.adapters.load(name, body.lora_path, load_inplace=body.load_inplace)
    except AdapterError as error:
        return _load_failed(context, name, error)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


@router.post("/v1/unload_lora_adapter", response_model=None)
async def unload_lora_adapter(body: UnloadLoRAAdapterRequest, context: Context) -> Response:
    name = body.lora_name
    if not name:
        return _error(context, 400, "'lora_name' needs to be provided to unload a LoRA adapter.")
    try:
        await context.adapters.unload(name)
    except AdapterNotFound as error:
        return _error(context, 404, f"The lora adapter '{name}' cannot be found.", code=error.code)
    except AdapterError as error:
        return _adapter_error(context, error)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


def _load_failed(context: ServerContext, name: str, error: AdapterError) -> Response:
    if isinstance(error, AdapterAlreadyLoaded):
        message = (
            f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set "
            "'load_inplace' to True."
        )
        return _error(context, error.status, message, code=error.code)
    return _adapter_error(context, error)


def _adapter_error(context: ServerContext, error: AdapterError) -> Response:
    body = adapter_error_body(error, error_type=_error_type(error.status))
    return _reply(context, error.status, body, adapter_error_headers(error))


def _error(context: ServerContext, status: int, message: str, *, code: str | None = None) -> Response:
    return _reply(context, status, error_body(message, error_type=_error_type(status), code=code))


def _error_type(status: int) -> str:
    if status >= 500:
        return _SERVER
    return _NOT_FOUND if status == 404 else _INVALID


def _reply(
    context: ServerContext, status: int, body: dict[str, Any], headers: Mapping[str, str] | None = None
) -> Response:
    return error_reply(context.metrics, status, {**body, "message": body["error"]["message"]}, headers)
