"""GET /v1/models: the base model's names first, then the adapters, as cards with vLLM's fields. No state of its own."""

from typing import Annotated, Any

from fastapi import Depends
from starlette.responses import Response

from server.api.auth import Role, role_router
from server.api.context import ServerContext, server_context
from server.api.json_list import json_list
from server.lifecycle.adapter_description import AdapterDescription
from server.lifecycle.alias_target import target_text

router = role_router(Role.INFERENCE)

Context = Annotated[ServerContext, Depends(server_context)]


@router.get("/v1/models", response_model=None)
async def list_models(context: Context) -> Response:
    bases = [_base_card(context, name) for name in context.adapters.names.base_names]
    adapters = [
        _adapter_card(context, adapter) async for adapter in context.adapters.view.each() if adapter.is_registered
    ]
    aliases = [_alias_card(context, name) for name in sorted(context.adapters.directory.aliases)]
    return await json_list([*bases, *adapters, *aliases], lambda card: card)


@router.get("/v1/models/{model:path}")
async def get_model(model: str, context: Context) -> dict[str, Any]:
    """The card of anything the `model` field of a request may say; raises ModelNotFound."""
    names = context.adapters.names
    named, alias = names.resolve(model), names.alias(model)
    if alias is not None:
        return _alias_card(context, alias)
    if named is None:
        return _base_card(context, model)
    return _adapter_card(context, context.adapters.view.describe(named.name))


def _base_card(context: ServerContext, name: str) -> dict[str, Any]:
    root = context.config.engine.model.model or context.engine.info.model_name
    return _card(context, name, created=context.adapters.started_at, root=root, parent=None)


def _adapter_card(context: ServerContext, adapter: AdapterDescription) -> dict[str, Any]:
    record = adapter.record
    root = record.source or ""
    return _card(context, record.name, created=record.created_at, root=root, parent=context.model_name)


def _alias_card(context: ServerContext, name: str) -> dict[str, Any]:
    """Its root says where it leads: adapters, with a share each when they are several."""
    targets = context.adapters.directory.aliases[name].targets
    root = ",".join(target_text(target) for target in targets)
    return _card(context, name, created=context.adapters.started_at, root=root, parent=context.model_name)


def _card(context: ServerContext, name: str, *, created: float, root: str, parent: str | None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": int(created),
        "owned_by": "loramux",
        "root": root,
        "parent": parent,
        "max_model_len": context.engine.info.max_model_len,
        "permission": [_permission(name, int(created))],
    }


def _permission(name: str, created: int) -> dict[str, Any]:
    """OpenAI's old permission object, which some clients still read."""
    return {
        "id": f"modelperm-{name}",
        "object": "model_permission",
        "created": created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
