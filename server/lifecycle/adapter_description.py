"""What is told of a name: to operators as JSON, to callers after a load. Knows nothing of how it came about."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from adapters.registry import AdapterInfo
from server.lifecycle.catalogue_records import AdapterRecord, VersionRecord
from server.lifecycle.load_job import LoadJob


class AdapterState(StrEnum):
    REGISTERED = "registered"  # known; its weights are on disk, or where they come from
    FETCHING = "fetching"
    VALIDATING = "validating"
    READY = "ready"  # in host memory
    ACTIVE = "active"  # … and in the device's pools
    DRAINING = "draining"  # no name leads here any more; requests that hold a lease finish
    FAILED = "failed"


class AdapterTier(StrEnum):
    DISK = "disk"
    HOST = "host"
    DEVICE = "device"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterDescription:
    """A name, what is wanted of it, and its version now. `info`, `known` and `tier` are None while it has none."""

    record: AdapterRecord
    known: VersionRecord | None = None
    info: AdapterInfo | None = None
    tier: AdapterTier | None = None
    job: LoadJob | None = None

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def is_registered(self) -> bool:
        """Requests may name it. Not a version that drains, nor a name whose first load is under way or has failed."""
        return self.info is not None and self.info.is_registered

    @property
    def state(self) -> AdapterState:
        if self.info is not None and not self.info.is_registered:
            return AdapterState.DRAINING
        if self.info is not None:
            return state_in(self.tier or AdapterTier.DISK)
        if self.job is not None:
            return AdapterState(self.job.stage.value)
        return AdapterState.FAILED if self.record.failure else AdapterState.REGISTERED

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "object": "adapter",
            "name": self.name,
            **self._version_dict(),
            "state": self.state.value,
            **self._record_dict(),
        }

    def _version_dict(self) -> dict[str, Any]:
        known, info = self.known, self.info
        return {
            "version": None if known is None else known.version,
            "tier": None if self.tier is None else self.tier.value,
            "lora_rank": None if known is None else known.lora_rank,
            "num_bytes": None if known is None else known.num_bytes,
            "modules": [] if known is None else list(known.modules),
            "features": [] if known is None else list(known.report.features),
            "report": None if known is None else known.report.to_dict(),
            "leases": 0 if info is None else info.leases,
            "loaded_at": None if info is None else info.loaded_at,
            "last_used": None if info is None else info.last_used,
        }

    def _record_dict(self) -> dict[str, Any]:
        record, job = self.record, self.job
        failure = record.failure
        return {
            "source": record.source,
            "pending": None if job is None else job.wanted.source,
            "progress": None if job is None else job.progress_dict(),
            "failure": None if failure is None else {"code": failure[0], "why": failure[1]},
            "pin": record.pin,
            "ttl": record.ttl,
            "priority": record.priority,
            "managed_by": record.managed_by,
            "previous": list(record.previous),
        }


_STATES = {
    AdapterTier.DISK: AdapterState.REGISTERED,
    AdapterTier.HOST: AdapterState.READY,
    AdapterTier.DEVICE: AdapterState.ACTIVE,
}


def state_in(tier: AdapterTier) -> AdapterState:
    """Of a name whose version is there."""
    return _STATES[tier]


def unloaded(name: str, version: str | None = None) -> dict[str, Any]:
    """What is said of a name that is gone, or of a version that has drained."""
    return {"object": "adapter", "name": name, "version": version, "state": "unloaded"}
