"""What the host tier has done so far, as plain numbers for whoever collects metrics."""

from dataclasses import dataclass


@dataclass(slots=True)
class HostTierCounters:
    """All grow for ever. Seconds are sums over what the count beside them counts."""

    hits: int = 0  # asked for and in memory
    misses: int = 0  # asked for and not: read, joined to a read, waited, or refused
    evictions: int = 0
    loads: int = 0  # reads that ended in memory
    load_seconds: float = 0.0  # from having room to being in memory
    failed_loads: int = 0
    waits: int = 0  # askers who had to queue for room, or behind one who did
    wait_seconds: float = 0.0
    timeouts: int = 0
