"""What can go wrong between a client and the engine; status, type and code are data on the class.

ServerError
├── BadRequest                 400 invalid_request_error; `param` names the field
│   └── ContextLengthExceeded  400 context_length_exceeded
├── InvalidAPIKey              401 invalid_api_key
├── Forbidden                  403 insufficient_permissions
├── ModelNotFound              404 model_not_found
├── BodyTooSlow                408 request_timeout: nothing of the body came for a while
├── AdapterConflict            409 adapter_conflict: adapters of one request replace the same part of the model
├── BodyTooLarge               413 request_too_large
├── QueueFull                  429 rate_limit_exceeded, with Retry-After
├── Unavailable                503 server_unavailable (starting or draining), with Retry-After
└── EngineFailure              500 engine_error: the step that held the request failed
"""

from typing import ClassVar


class ServerError(Exception):
    """Root. `message` is for people and names the value, the limit and the way out."""

    status: ClassVar[int] = 500
    error_type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None
    retry_after: ClassVar[int | None] = None  # seconds

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class BadRequest(ServerError):
    status = 400
    error_type = "invalid_request_error"


class ContextLengthExceeded(BadRequest):
    code = "context_length_exceeded"


class InvalidAPIKey(ServerError):
    status = 401
    error_type = "invalid_request_error"
    code = "invalid_api_key"


class Forbidden(ServerError):
    status = 403
    error_type = "invalid_request_error"
    code = "insufficient_permissions"


class ModelNotFound(ServerError):
    status = 404
    error_type = "invalid_request_error"
    code = "model_not_found"


class BodyTooSlow(ServerError):
    status = 408
    error_type = "invalid_request_error"
    code = "request_timeout"


class AdapterConflict(ServerError):
    status = 409
    error_type = "invalid_request_error"
    code = "adapter_conflict"


class BodyTooLarge(ServerError):
    status = 413
    error_type = "invalid_request_error"
    code = "request_too_large"


class QueueFull(ServerError):
    status = 429
    error_type = "rate_limit_error"
    code = "rate_limit_exceeded"
    retry_after = 1


class Unavailable(ServerError):
    status = 503
    code = "server_unavailable"
    retry_after = 5


class EngineFailure(ServerError):
    code = "engine_error"
