"""Names that lead to adapters by weight: made, moved in one step, rolled back. Knows nothing of requests."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from adapters.errors import AdapterNotFound
from adapters.registry import AdapterRegistry
from adapters.untrusted_json import shown
from server.lifecycle.adapter_loader import AdapterLoader
from server.lifecycle.aliases import check_targets
from server.lifecycle.catalogue_records import AliasRecord, AliasTarget
from server.lifecycle.directory import AdapterDirectory
from server.lifecycle.errors import AliasNotFound, ChangedElsewhere, NameConflict, NoPreviousVersion

_KEPT = 5  # earlier targets, for rollback


class AliasService:
    def __init__(self, directory: AdapterDirectory, registry: AdapterRegistry, loader: AdapterLoader) -> None:
        self._directory = directory
        self._registry = registry
        self._loader = loader

    def refuse_name(self, name: str) -> None:
        """Raises NameConflict when an adapter's name would be an alias's."""
        if name in self._directory.aliases:
            raise NameConflict(f"{shown(name)!r} is an alias; delete it first, or choose another name")

    def get(self, name: str) -> AliasRecord:
        """Raises AliasNotFound."""
        alias = self._directory.aliases.get(name)
        if alias is None:
            raise AliasNotFound(f"there is no alias {shown(name)!r}")
        return alias

    async def put(self, name: str, targets: Sequence[AliasTarget], *, managed_by: str = "api") -> AliasRecord:
        """Make an alias, or move it in one step. A target's version may be given by its first digits. Raises
        AdapterNameInvalid, AdapterNotFound, NameConflict.
        """
        self._registry.check_name(name)
        check_targets(targets)
        async with self._loader.name_lock(name), self._directory.linking:
            return await self._directory.retried(lambda: self._put(name, targets, managed_by))

    async def rollback(self, name: str) -> AliasRecord:
        """The targets before. Raises AliasNotFound, NoPreviousVersion, AdapterNotFound."""
        async with self._loader.name_lock(name), self._directory.linking:
            return await self._directory.retried(lambda: self._rollback(name))

    async def remove(self, name: str) -> None:
        """Raises AliasNotFound."""
        async with self._loader.name_lock(name):
            await self._directory.retried(lambda: self._directory.delete_alias(self.get(name)))

    def managed(self, owner: str) -> Mapping[str, Sequence[AliasTarget]]:
        return {a.name: a.targets for a in self._directory.aliases.values() if a.managed_by == owner}

    async def _put(self, name: str, targets: Sequence[AliasTarget], managed_by: str) -> AliasRecord:
        if name in self._directory.records:
            raise NameConflict(f"{shown(name)!r} is an adapter; an alias needs a name of its own")
        alias = self._directory.aliases.get(name) or AliasRecord(name=name, targets=())
        resolved = tuple(self._resolved(target) for target in targets)
        if resolved == alias.targets and managed_by == alias.managed_by:
            return await self._as_it_stands(alias)
        before = (alias.targets, *alias.previous)[:_KEPT] if alias.targets else ()
        return await self._directory.put_alias(replace(alias, targets=resolved, previous=before, managed_by=managed_by))

    async def _as_it_stands(self, alias: AliasRecord) -> AliasRecord:
        """Nothing is written for what is so already, so it is looked up instead whether it still is."""
        await self._directory.refresh()
        if self._directory.aliases.get(alias.name) != alias:
            raise ChangedElsewhere(f"the alias {shown(alias.name)!r} was changed by another server")
        return alias

    async def _rollback(self, name: str) -> AliasRecord:
        alias = self.get(name)
        if not alias.previous:
            raise NoPreviousVersion(f"the alias {name!r} has not been moved yet")
        targets, *older = alias.previous
        resolved = tuple(self._resolved(target) for target in targets)
        return await self._directory.put_alias(
            replace(alias, targets=resolved, previous=(alias.targets, *older)[:_KEPT])
        )

    def _resolved(self, target: AliasTarget) -> AliasTarget:
        if target.adapter not in self._registry:
            raise AdapterNotFound(f"no adapter is registered as {shown(target.adapter)!r}; an alias leads to adapters")
        if target.version is None:
            return target
        version = self._registry.find_version(target.adapter, target.version)
        if version is None:
            raise AdapterNotFound(
                f"{shown(target.adapter)!r} neither is nor keeps a version that begins with {shown(target.version)!r}"
            )
        return replace(target, version=version)
