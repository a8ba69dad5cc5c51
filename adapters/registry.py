"""Names → versions, and who still uses a version. Owned by the event loop: no locks, no awaits, no input or output.

A name is an alias that may be moved; a version never changes. `acquire` resolves a name and counts the use in one step,
so an unload cannot come between the two. Versions a name stood for before may be kept beside the present one, to be
asked for as name@version. A version with no name and no lease is reported to the owner exactly once, who then frees its
bytes. Knows nothing of weights, files or requests, nor where a version's weights are.

    register ─→ REGISTERED ── name taken away, leases open ─→ DRAINING ── last lease given back ─→ on_unused(version)
                  └───── name taken away, no lease ─────────────────────────────────────────→ on_unused(version)
"""

import re
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

from adapters.adapter_ref import AdapterRef, AdapterVersion, Lease
from adapters.errors import AdapterAlreadyLoaded, AdapterNameInvalid, AdapterNotFound
from adapters.untrusted_json import shown

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]{0,127}")
NAME_RULE = (
    "1 to 128 letters, digits and . _ / : @ -, a letter or digit first, without '..' or '//' and without a slash at "
    "the end"
)
MIN_VERSION_DIGITS = 8  # of a version's, in name@version


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """A name's version as it stood at one moment. `leases` counts the version's, whichever name they were asked by."""

    ref: AdapterRef
    is_registered: bool  # False: no name leads here any more, and requests that hold a lease finish
    leases: int
    loaded_at: float  # seconds since the epoch
    last_used: float | None  # when a lease was last taken by this name


@dataclass(slots=True)
class _Name:
    ref: AdapterRef
    loaded_at: float
    last_used: float | None = None
    previous: tuple[AdapterRef, ...] = ()  # kept to be asked for as name@version, the newest first


@dataclass(slots=True)
class _Version:
    """One version's holders. `last` is the name it lost most recently, kept to describe it while it drains."""

    names: set[str] = field(default_factory=set)  # that stand for it, or keep it
    leases: set[Lease] = field(default_factory=set)
    last: _Name | None = None

    @property
    def is_unused(self) -> bool:
        return not self.names and not self.leases


def _is_name(name: str) -> bool:
    return bool(_NAME.fullmatch(name)) and ".." not in name and "//" not in name and not name.endswith("/")


def check_adapter_name(name: str) -> None:
    """Raises AdapterNameInvalid. Slashes, colons and @ are in use (org/repo, base:adapter, name@revision)."""
    if not _is_name(name):
        raise AdapterNameInvalid(f"{shown(name)!r} cannot be an adapter's name; a name has {NAME_RULE}")


class AdapterRegistry:
    """`reserved_names` are the base model's; `on_unused` is called after the registry's own state is consistent, and
    `on_released` after a lease was given back, the last of its version or not, before that."""

    def __init__(
        self,
        *,
        reserved_names: Collection[str],
        on_unused: Callable[[AdapterVersion], None],
        on_released: Callable[[AdapterVersion], None] = lambda version: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._reserved = frozenset(reserved_names)
        self._on_unused = on_unused
        self._on_released = on_released
        self._clock = clock
        self._names: dict[str, _Name] = {}
        self._versions: dict[AdapterVersion, _Version] = {}

    def check_name(self, name: str) -> None:
        """Raises AdapterNameInvalid when no adapter may have the name; asked before the work of loading is done."""
        check_adapter_name(name)
        if name in self._reserved:
            raise AdapterNameInvalid(f"{shown(name)!r} is the base model's name; choose another")

    def register(self, ref: AdapterRef, replace: bool = False, *, previous: tuple[AdapterRef, ...] = ()) -> AdapterRef:
        """Give `ref.name` to `ref.version` and keep `previous` beside it; returns what the name now stands for.

        The same name and version again keeps what stands there. Other bytes under a name that is taken need `replace`;
        the old version then drains, unless it is kept. Raises AdapterNameInvalid, AdapterAlreadyLoaded.
        """
        self.check_name(ref.name)
        old = self._names.get(ref.name)
        if old is not None and old.ref.version != ref.version and not replace:
            raise AdapterAlreadyLoaded(
                f"{ref.name!r} is loaded with other weights (version {old.ref.version[:12]}); unload it first, or set "
                "load_inplace to true"
            )
        if old is not None and old.ref.version == ref.version:
            new = _Name(old.ref, old.loaded_at, old.last_used, previous)
        else:
            new = _Name(ref, self._clock(), None, previous)
        self._names[ref.name] = new
        for held in _held(new):
            self._versions.setdefault(held.version, _Version()).names.add(ref.name)
        if old is not None:
            self._take_away(old, unless=new)
        return new.ref

    def unregister(self, name: str) -> AdapterRef:
        """Take a name away at once; its versions drain. Raises AdapterNotFound."""
        known = self._names.pop(name, None)
        if known is None:
            raise self._not_found(name)
        self._take_away(known)
        return known.ref

    def acquire(self, name: str) -> Lease:
        """Resolve a name and hold its version until the lease is released. Raises AdapterNotFound."""
        return self._lease(self._known(name), self._known(name).ref)

    def acquire_version(self, name: str, version: AdapterVersion) -> Lease:
        """Hold a version that `name` stands for or keeps. Raises AdapterNotFound."""
        known = self._known(name)
        for ref in _held(known):
            if ref.version == version:
                return self._lease(known, ref)
        raise AdapterNotFound(f"{shown(name)!r} has no version {version[:12]}")

    def find_version(self, name: str, digits: str) -> AdapterVersion | None:
        """The one version that `name` stands for or keeps and that begins with `digits`; None without exactly one."""
        if name not in self._names or len(digits) < MIN_VERSION_DIGITS:
            return None
        found = {ref.version for ref in _held(self._names[name]) if ref.version.startswith(digits)}
        return found.pop() if len(found) == 1 else None

    def describe(self, name: str) -> AdapterInfo:
        """What a name stands for now. Raises AdapterNotFound."""
        return self._info(self._known(name), is_registered=True)

    def list(self) -> tuple[AdapterInfo, ...]:
        """All names in alphabetical order, then the versions that drain."""
        named = [self._info(self._names[name], is_registered=True) for name in sorted(self._names)]
        return (*named, *self.draining())

    def draining(self) -> tuple[AdapterInfo, ...]:
        """The versions that no name leads to any more."""
        return tuple(self._info(v.last, is_registered=False) for v in self._versions.values() if v.last and not v.names)

    def list_versions(self, versions: Collection[AdapterVersion]) -> tuple[AdapterInfo, ...]:
        """As `list`, of those names and draining versions that are of `versions`."""
        held = [(version, self._versions[version]) for version in versions if version in self._versions]
        names = sorted(
            name for version, each in held for name in each.names if self._names[name].ref.version == version
        )
        named = [self._info(self._names[name], is_registered=True) for name in names]
        draining = [self._info(each.last, is_registered=False) for _, each in held if each.last and not each.names]
        return (*named, *draining)

    @property
    def max_lora_rank(self) -> int:
        """Of the names and the versions that drain; 0 when there are none."""
        named = max((known.ref.lora_rank for known in self._names.values()), default=0)
        return max([named, *(info.ref.lora_rank for info in self.draining())])

    def leases(self, version: AdapterVersion) -> tuple[Lease, ...]:
        """The open ones."""
        held = self._versions.get(version)
        return () if held is None else tuple(held.leases)

    def num_leases(self, version: AdapterVersion) -> int:
        held = self._versions.get(version)
        return 0 if held is None else len(held.leases)

    def is_current(self, version: AdapterVersion) -> bool:
        """Some name stands for the version now, and does not only keep it."""
        held = self._versions.get(version)
        return held is not None and any(self._names[name].ref.version == version for name in held.names)

    def is_held(self, version: AdapterVersion) -> bool:
        """Some name or lease is on the version, so its bytes must stay."""
        return version in self._versions

    def names_of(self, version: AdapterVersion) -> tuple[str, ...]:
        """Those that stand for the version or keep it, in alphabetical order."""
        held = self._versions.get(version)
        return () if held is None else tuple(sorted(held.names))

    def last_name_of(self, version: AdapterVersion) -> str | None:
        """Of a version that drains, the name it lost last."""
        held = self._versions.get(version)
        return held.last.ref.name if held is not None and held.last is not None and not held.names else None

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def check_integrity(self) -> None:
        """Raises AssertionError when the two tables disagree or a version is kept that nobody holds."""
        for name, known in self._names.items():
            assert known.ref.name == name
            assert name not in self._reserved
            for ref in _held(known):
                assert name in self._versions[ref.version].names
        for version, held in self._versions.items():
            assert not held.is_unused
            assert all(lease.is_open and lease.ref.version == version for lease in held.leases)
            assert all(version in {ref.version for ref in _held(self._names[name])} for name in held.names)
            assert held.names or held.last is not None

    def _known(self, name: str) -> _Name:
        known = self._names.get(name)
        if known is None:
            raise self._not_found(name)
        return known

    def _info(self, known: _Name, *, is_registered: bool) -> AdapterInfo:
        leases = len(self._versions[known.ref.version].leases)
        return AdapterInfo(known.ref, is_registered, leases, known.loaded_at, known.last_used)

    def _lease(self, known: _Name, ref: AdapterRef) -> Lease:
        known.last_used = self._clock()
        lease = Lease(ref, self._give_back)
        self._versions[ref.version].leases.add(lease)
        return lease

    def _take_away(self, old: _Name, unless: _Name | None = None) -> None:
        """What `old` held and `unless` does not loses the name."""
        still = {ref.version for ref in _held(unless)} if unless is not None else set()
        for ref in _held(old):
            if ref.version not in still:
                held = self._versions[ref.version]
                held.names.discard(ref.name)
                held.last = _Name(ref, old.loaded_at, old.last_used)
                self._forget_if_unused(ref.version)

    def _give_back(self, lease: Lease) -> None:
        version = lease.ref.version
        held = self._versions[version]
        held.leases.discard(lease)
        self._on_released(version)
        self._forget_if_unused(version)

    def _forget_if_unused(self, version: AdapterVersion) -> None:
        if version in self._versions and self._versions[version].is_unused:
            del self._versions[version]
            self._on_unused(version)

    def _not_found(self, name: str) -> AdapterNotFound:
        # Names that do exist are for the wire to suggest, to those it lists them for.
        return AdapterNotFound(f"no adapter is registered as {shown(name)!r}")


def _held(known: _Name) -> tuple[AdapterRef, ...]:
    return (known.ref, *known.previous)
