"""Every way a request can fail, turned into OpenAI's four keys: message, type, param, code.

Knows nothing of what the routes do. Statuses and codes are data on the error classes; no message is read to decide
one. What a client sent is never repeated, and an unforeseen exception tells the client its request id and no more.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapters.errors import AdapterError, AdapterRefused
from server.api.disconnect import ClientGone
from server.errors import BadRequest, ServerError
from server.metrics import Metrics

INTERNAL_ERROR_MESSAGE = "The server had an error while processing your request; its id is in the header x-request-id."

_STATUS_ERRORS: Mapping[int, tuple[str, str]] = {
    404: ("not_found", "There is no such route on this server."),
    405: ("method_not_allowed", "This route does not answer this method."),
}

_STATUS_HEADERS: Mapping[int, Mapping[str, str]] = {
    401: {"www-authenticate": "Bearer"},
    408: {"connection": "close"},  # the rest of the body may still come, and nobody will read it
}


def error_body(message: str, *, error_type: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": error_type, "param": param, "code": code}}


def server_error_body(error: ServerError) -> dict[str, Any]:
    return error_body(error.message, error_type=error.error_type, param=error.param, code=error.code)


def adapter_error_body(error: AdapterError, *, error_type: str | None = None) -> dict[str, Any]:
    """OpenAI's four keys and, of a refusal, for programs, what was refused: feature, tensor, why and fix."""
    by_status = "invalid_request_error" if error.status < 500 else "server_error"
    body = error_body(str(error), error_type=error_type or by_status, code=error.code)
    if isinstance(error, AdapterRefused):
        body["error"] |= {"feature": error.feature, "tensor": error.tensor, "why": error.why, "fix": error.fix}
    return body


def adapter_error_headers(error: AdapterError) -> Mapping[str, str]:
    retry_after = getattr(error, "retry_after", None)  # seconds; of errors that may pass
    return {} if retry_after is None else {"retry-after": str(retry_after)}


def error_response(request: Request, error: ServerError) -> JSONResponse:
    headers = {**_STATUS_HEADERS.get(error.status, {})}
    if error.retry_after is not None:
        headers["retry-after"] = str(error.retry_after)
    if error.status >= 500 and error.retry_after is None:
        headers["x-should-retry"] = "false"  # a request that broke a step should not be replayed by an SDK
    return _reply(request, error.status, server_error_body(error), headers)


def internal_error_response(request: Request) -> JSONResponse:
    """For an exception nobody foresaw: a fixed text, so that nothing of it reaches the client."""
    body = error_body(INTERNAL_ERROR_MESSAGE, error_type="server_error", code="internal_error")
    return _reply(request, 500, body, {"x-should-retry": "false"})


def header_limit_response(request: Request, max_bytes: int) -> JSONResponse:
    message = f"The request line and headers are larger than {max_bytes} bytes, the limit of this server."
    return _reply(request, 431, error_body(message, error_type="invalid_request_error", code="headers_too_large"))


def _reply(
    request: Request, status: int, body: dict[str, Any], headers: Mapping[str, str] | None = None
) -> JSONResponse:
    return error_reply(request.app.state.context.metrics, status, body, headers)


def error_reply(
    metrics: Metrics, status: int, body: dict[str, Any], headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """Every whole reply with an error is made here, so that none goes uncounted."""
    metrics.error(status, body["error"]["code"])
    return JSONResponse(body, status_code=status, headers=headers)


def validation_error(errors: Sequence[Mapping[str, Any]]) -> BadRequest:
    """The first of pydantic's errors as a BadRequest whose `param` is the path of the field."""
    first = errors[0]
    param = _field_path(first["loc"]) or None
    subject = f"'{param}'" if param else "The request body"
    others = f" ({len(errors) - 1} more)" if len(errors) > 1 else ""
    message = first["msg"] if first["type"] != "value_error" else str(first["ctx"]["error"])
    return BadRequest(f"{subject}: {message}{others}.".replace("..", "."), param=param)


def _field_path(loc: Sequence[str | int]) -> str:
    """("body", "messages", 0, "str", "role") → "messages.0.role"; names of union members are not fields."""
    parts = [str(part) for part in loc if isinstance(part, int) or part.isidentifier()]
    if parts[:1] in (["body"], ["query"], ["path"], ["header"]):
        parts = parts[1:]
    return ".".join(parts)


async def _on_server_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServerError)
    return error_response(request, error)


async def _on_adapter_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, AdapterError)
    return _reply(request, error.status, adapter_error_body(error), adapter_error_headers(error))


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(request, validation_error(error.errors()))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code, message = _STATUS_ERRORS.get(error.status_code, (None, error.detail))
    error_type = "invalid_request_error" if error.status_code < 500 else "server_error"
    return _reply(request, error.status_code, error_body(message, error_type=error_type, code=code), error.headers)


async def _on_client_gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=499)  # nginx's number; it is read by logs only


def install_error_handlers(app: FastAPI) -> None:
    """Exceptions no handler knows are answered by the request middleware (server/api/middleware.py)."""
    app.add_exception_handler(ServerError, _on_server_error)
    app.add_exception_handler(AdapterError, _on_adapter_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientGone, _on_client_gone)
