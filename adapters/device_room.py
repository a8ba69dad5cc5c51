"""What an adapter takes of the device, and what there is of it: rows of the pools, and bytes beside them.

Only on a device with memory of its own are there such bytes: on the CPU, what an adapter has besides pairs is read
where it lies, in host memory, which is counted there. Numbers alone; no torch, and nobody's name.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceNeed:
    """Of one adapter."""

    num_rows: int = 1  # of the pools
    num_extra_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRoom:
    """For the adapters of one step together; None = no limit."""

    num_rows: int
    max_loras: int | None = None
    max_extra_bytes: int | None = None
