"""What is told of an adapter: to operators as JSON, to callers after a load. Knows nothing of how either came about."""

from dataclasses import dataclass
from typing import Any

from adapters.adapter_ref import AdapterRef
from adapters.load_report import LoadReport
from adapters.registry import AdapterInfo, AdapterState


@dataclass(frozen=True, slots=True)
class AdapterDescription:
    """A name and its version now. `tier` is device (a row range in the pools) or host; bytes are host memory's."""

    info: AdapterInfo
    report: LoadReport
    tier: str

    @property
    def ref(self) -> AdapterRef:
        return self.info.ref

    @property
    def is_registered(self) -> bool:
        """False for a version that drains: no name leads to it."""
        return self.info.state is AdapterState.READY

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        ref, info = self.ref, self.info
        return {
            "name": ref.name,
            "version": ref.version,
            "state": info.state.value,
            "tier": self.tier,
            "lora_rank": ref.lora_rank,
            "num_bytes": ref.num_bytes,
            "modules": list(ref.modules),
            "features": list(self.report.features),
            "leases": info.leases,
            "loaded_at": info.loaded_at,
            "last_used": info.last_used,
            "source": ref.source,
            "report": self.report.to_dict(),
        }


@dataclass(frozen=True, slots=True)
class AdapterLoad:
    """What a load did: `outcome` is loaded (the name is new), replaced or unchanged."""

    ref: AdapterRef
    outcome: str
