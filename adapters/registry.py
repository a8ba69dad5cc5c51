"""Names → versions, and who still uses a version. Owned by the event loop: no locks, no awaits, no input or output.

A name is an alias that may be moved; a version never changes. `acquire` resolves a name and counts the use in one step,
so an unload cannot come between the two. A version with no name and no lease is reported to the owner exactly once, who
then frees its bytes. Knows nothing of weights, files or requests.

    register ─→ READY ── name taken away, leases open ─→ DRAINING ── last lease released ─→ on_unused(version), gone
                  └───── name taken away, no lease ──────────────────────────────────────→ on_unused(version), gone
"""

import re
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from enum import StrEnum

from adapters.adapter_ref import AdapterRef, AdapterVersion, Lease
from adapters.errors import AdapterAlreadyLoaded, AdapterNameInvalid, AdapterNotFound
from adapters.untrusted_json import shown

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]{0,127}")
NAME_RULE = (
    "1 to 128 letters, digits and . _ / : @ -, a letter or digit first, without '..' or '//' and without a slash at "
    "the end"
)


class AdapterState(StrEnum):
    READY = "ready"
    DRAINING = "draining"  # no name leads here any more; requests that hold a lease finish


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """A name's version as it stood at one moment. `leases` counts the version's, whichever name they were asked by."""

    ref: AdapterRef
    state: AdapterState
    leases: int
    loaded_at: float  # seconds since the epoch
    last_used: float | None  # when a lease was last taken by this name


@dataclass(slots=True)
class _Alias:
    ref: AdapterRef
    loaded_at: float
    last_used: float | None = None


@dataclass(slots=True)
class _Version:
    """One version's holders. `last` is the alias it lost most recently, kept to describe it while it drains."""

    names: set[str] = field(default_factory=set)
    leases: int = 0
    last: _Alias | None = None

    @property
    def is_unused(self) -> bool:
        return not self.names and self.leases == 0


def check_adapter_name(name: str) -> None:
    """Raises AdapterNameInvalid. Slashes, colons and @ are in use (org/repo, base:adapter, name@revision)."""
    if not _NAME.fullmatch(name) or ".." in name or "//" in name or name.endswith("/"):
        raise AdapterNameInvalid(f"{shown(name)!r} cannot be an adapter's name; a name has {NAME_RULE}")


class AdapterRegistry:
    """`reserved_names` are the base model's; `on_unused` is called after the registry's own state is consistent."""

    def __init__(
        self,
        *,
        reserved_names: Collection[str],
        on_unused: Callable[[AdapterVersion], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._reserved = frozenset(reserved_names)
        self._on_unused = on_unused
        self._clock = clock
        self._aliases: dict[str, _Alias] = {}
        self._versions: dict[AdapterVersion, _Version] = {}

    def check_name(self, name: str) -> None:
        """Raises AdapterNameInvalid when no adapter may have the name; asked before the work of loading is done."""
        check_adapter_name(name)
        if name in self._reserved:
            raise AdapterNameInvalid(f"{shown(name)!r} is the base model's name; choose another")

    def register(self, ref: AdapterRef, replace: bool = False) -> AdapterRef:
        """Give `ref.name` to `ref.version`; returns what the name now stands for.

        The same name and version again changes nothing. Other bytes under a name that is taken need `replace`; the old
        version then drains. Raises AdapterNameInvalid, AdapterAlreadyLoaded.
        """
        self.check_name(ref.name)
        old = self._aliases.get(ref.name)
        if old is not None and old.ref.version == ref.version:
            return old.ref
        if old is not None and not replace:
            raise AdapterAlreadyLoaded(
                f"{ref.name!r} is loaded with other weights (version {old.ref.version[:12]}); unload it first, or set "
                "load_inplace to true"
            )
        self._aliases[ref.name] = _Alias(ref, self._clock())
        self._versions.setdefault(ref.version, _Version()).names.add(ref.name)
        if old is not None:
            self._take_name_away(old)
        return ref

    def unregister(self, name: str) -> AdapterRef:
        """Take a name away at once; its version drains. Raises AdapterNotFound."""
        alias = self._aliases.pop(name, None)
        if alias is None:
            raise self._not_found(name)
        self._take_name_away(alias)
        return alias.ref

    def acquire(self, name: str) -> Lease:
        """Resolve a name and hold its version until the lease is released. Raises AdapterNotFound."""
        alias = self._aliases.get(name)
        if alias is None:
            raise self._not_found(name)
        alias.last_used = self._clock()
        self._versions[alias.ref.version].leases += 1
        return Lease(alias.ref, self._give_back)

    def describe(self, name: str) -> AdapterInfo:
        """What a name stands for now. Raises AdapterNotFound."""
        alias = self._aliases.get(name)
        if alias is None:
            raise self._not_found(name)
        return self._info(alias, AdapterState.READY)

    def list(self) -> tuple[AdapterInfo, ...]:
        """All names in alphabetical order, then the versions that drain."""
        ready = [self._info(self._aliases[name], AdapterState.READY) for name in sorted(self._aliases)]
        draining = [
            self._info(v.last, AdapterState.DRAINING) for v in self._versions.values() if v.last and not v.names
        ]
        return (*ready, *draining)

    def is_held(self, version: AdapterVersion) -> bool:
        """Some name or lease is on the version, so its bytes must stay."""
        return version in self._versions

    def __contains__(self, name: object) -> bool:
        return name in self._aliases

    def __len__(self) -> int:
        return len(self._aliases)

    def check_integrity(self) -> None:
        """Raises AssertionError when the two tables disagree or a version is kept that nobody holds."""
        for name, alias in self._aliases.items():
            assert alias.ref.name == name
            assert name in self._versions[alias.ref.version].names
            assert name not in self._reserved
        for version, held in self._versions.items():
            assert held.leases >= 0
            assert not held.is_unused
            assert all(self._aliases[name].ref.version == version for name in held.names)
            assert held.names or held.last is not None

    def _info(self, alias: _Alias, state: AdapterState) -> AdapterInfo:
        leases = self._versions[alias.ref.version].leases
        return AdapterInfo(alias.ref, state, leases, alias.loaded_at, alias.last_used)

    def _take_name_away(self, alias: _Alias) -> None:
        held = self._versions[alias.ref.version]
        held.names.discard(alias.ref.name)
        held.last = alias
        self._forget_if_unused(alias.ref.version)

    def _give_back(self, ref: AdapterRef) -> None:
        self._versions[ref.version].leases -= 1
        self._forget_if_unused(ref.version)

    def _forget_if_unused(self, version: AdapterVersion) -> None:
        if self._versions[version].is_unused:
            del self._versions[version]
            self._on_unused(version)

    def _not_found(self, name: str) -> AdapterNotFound:
        # Names that do exist are for the wire to suggest, to those it lists them for.
        return AdapterNotFound(f"no adapter is registered as {shown(name)!r}")
