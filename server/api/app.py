"""The FastAPI application: routers, error handlers, the outermost layer. Knows nothing of what the routes do.

No documentation routes: FastAPI's load scripts from a CDN, and this server sends nobody elsewhere. Slashes are not
redirected: the target would be built from the client's Host header.
"""

from fastapi import FastAPI

from server.api import adapters, aliases, chat, completions, health, models, uploads, vllm
from server.api.auth import KeyRing
from server.api.context import ServerContext
from server.api.error_handlers import install_error_handlers
from server.api.middleware import RequestMiddleware


def create_app(context: ServerContext) -> FastAPI:
    """The application for one running engine."""
    app = FastAPI(title="loramux", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.context = context
    app.state.keys = KeyRing(context.config.http)
    install_error_handlers(app)
    for module in (completions, chat, models, uploads, adapters, aliases, vllm, health):
        app.include_router(module.router)
    app.add_middleware(RequestMiddleware, max_header_bytes=context.config.http.max_header_bytes)
    return app
