"""Routes for aliases: names that lead to adapters by weight. Knows nothing of how a request's choice is made."""

from typing import Annotated, Any

from fastapi import Depends
from pydantic import Field

from server.api.adapters import AdminFields
from server.api.auth import Role, role_router
from server.api.context import ServerContext, server_context
from server.lifecycle.alias_target import parse_target
from server.lifecycle.aliases import MAX_TARGETS
from server.lifecycle.catalogue_records import AliasRecord

router = role_router(Role.ADMIN)

Context = Annotated[ServerContext, Depends(server_context)]


class TargetFields(AdminFields):
    """`adapter` is a name, or name@ and 8 or more digits of one of its versions."""

    adapter: str = Field(min_length=1, max_length=512)
    weight: float = Field(1.0, ge=0, le=1e6)


class PutAliasRequest(AdminFields):
    targets: list[TargetFields] = Field(min_length=1, max_length=MAX_TARGETS)


@router.get("/v1/aliases")
async def list_aliases(context: Context) -> dict[str, Any]:
    aliases = context.adapters.directory.aliases
    return {"object": "list", "data": [_described(aliases[name]) for name in sorted(aliases)]}


@router.get("/v1/aliases/{name:path}")
async def describe_alias(name: str, context: Context) -> dict[str, Any]:
    return _described(context.adapters.aliases.get(name))


@router.put("/v1/aliases/{name:path}")
async def put_alias(name: str, body: PutAliasRequest, context: Context) -> dict[str, Any]:
    """Make the alias, or move it: from one request to the next all of it has changed."""
    targets = [parse_target(target.adapter, target.weight) for target in body.targets]
    return _described(await context.adapters.aliases.put(name, targets))


@router.post("/v1/aliases/{name:path}/rollback")
async def roll_back_alias(name: str, context: Context) -> dict[str, Any]:
    return _described(await context.adapters.aliases.rollback(name))


@router.delete("/v1/aliases/{name:path}")
async def delete_alias(name: str, context: Context) -> dict[str, Any]:
    await context.adapters.aliases.remove(name)
    return {"object": "alias", "name": name, "deleted": True}


def _described(alias: AliasRecord) -> dict[str, Any]:
    targets = [{"adapter": t.adapter, "version": t.version, "weight": t.weight} for t in alias.targets]
    return {"object": "alias", "name": alias.name, "targets": targets, "managed_by": alias.managed_by}
