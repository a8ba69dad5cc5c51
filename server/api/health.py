"""Is it alive, which version is it, how is it doing. Open to all: probes and gateways carry no keys.

/metrics names the adapters (docs/metrics.md says how to keep it inside). Knows nothing of models.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

from fastapi import Depends
from starlette.responses import Response

from server.api.auth import Role, role_router
from server.api.context import ServerContext, server_context
from server.errors import Unavailable
from server.metrics import CONTENT_TYPE

router = role_router(Role.PUBLIC)

Context = Annotated[ServerContext, Depends(server_context)]


@router.api_route("/health", methods=["GET", "HEAD"])
async def health(context: Context) -> dict[str, str]:
    """200 while requests are taken; 503 when the engine is gone or the server drains."""
    if not context.engine.is_healthy:
        raise Unavailable("The engine is not taking requests: it is shutting down or has stopped.")
    return {"status": "ok"}


@router.get("/version")
async def show_version() -> dict[str, str]:
    return {"version": _package_version()}


@router.get("/metrics", response_class=Response)
async def metrics(context: Context) -> Response:
    return Response(context.metrics.render(), headers={"content-type": CONTENT_TYPE})


def _package_version() -> str:
    try:
        return version("loramux")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "unknown"
