"""What the catalogue holds: adapters' names and what is wanted of them, aliases, versions. Values, no database."""

from collections.abc import Mapping
from dataclasses import dataclass

from adapters.adapter_ref import AdapterVersion
from adapters.load_report import LoadReport


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRecord:
    """What is wanted and known of an adapter's name. `revision` 0: not in the catalogue yet."""

    name: str
    source: str | None = None  # where `version` came from
    version: AdapterVersion | None = None  # None: never loaded yet
    previous: tuple[AdapterVersion, ...] = ()  # replaced ones still kept for name@version and rollback, newest first
    pending: str | None = None  # a load that was acknowledged and is not finished (pending_load.py)
    failure: tuple[str, str] | None = None  # (code, why) of the last load, when it failed
    pin: bool = False
    ttl: float | None = None  # seconds from the last change on after which the name is taken away
    priority: int = 0  # higher is evicted later
    managed_by: str = "api"  # api | start | folder | file | miss
    revision: int = 0  # the sequence number of this name's last change: never the same twice, also over a deletion
    created_at: float = 0.0  # seconds since the epoch; 0 = set when it is put
    updated_at: float = 0.0  # set by every put

    @property
    def named_versions(self) -> frozenset[AdapterVersion]:
        current = () if self.version is None else (self.version,)
        return frozenset((*current, *self.previous))


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionRecord:
    """What is known of a version without reading its weights. Versions never change, so neither does this."""

    version: AdapterVersion
    lora_rank: int
    num_bytes: int
    modules: tuple[str, ...]
    report: LoadReport
    source: str = ""  # where it was first read from


@dataclass(frozen=True, slots=True, kw_only=True)
class AliasTarget:
    adapter: str
    version: AdapterVersion | None = None  # None: whatever the name stands for now
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AliasRecord:
    """A name that leads to adapters by weight. `previous` are the targets before, newest first, for rollback."""

    name: str
    targets: tuple[AliasTarget, ...]
    previous: tuple[tuple[AliasTarget, ...], ...] = ()
    managed_by: str = "api"
    revision: int = 0

    @property
    def named_versions(self) -> frozenset[AdapterVersion]:
        every = (target.version for targets in (self.targets, *self.previous) for target in targets)
        return frozenset(version for version in every if version is not None)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All there is, as of one moment."""

    sequence: int
    adapters: Mapping[str, AdapterRecord]
    aliases: Mapping[str, AliasRecord]
    versions: Mapping[AdapterVersion, VersionRecord]


@dataclass(frozen=True, slots=True)
class Changes:
    """What became different since an earlier sequence number; None = the name is gone.

    A name that turned from an adapter into an alias is None among the adapters, and the other way round. `versions` has
    those which the names here name; one that no name names any more may be forgotten.
    """

    sequence: int
    adapters: Mapping[str, AdapterRecord | None]
    aliases: Mapping[str, AliasRecord | None]
    versions: Mapping[AdapterVersion, VersionRecord]
