"""Why an adapter was not loaded, found or moved; the codes are stable and documented in docs/adapters.md.

AdapterError
├── AdapterRefused            the folder cannot be served; carries code, feature, tensor, why, fix
├── AdapterNotFound           no adapter of that name, or no folder at that place
├── AdapterAlreadyLoaded      the name is taken by other bytes
├── AdapterNameInvalid        the name cannot be an adapter's name
├── AdapterOptionInvalid      a load option is of no form that it may have
├── AdapterCapacity           host memory for adapters is full
├── VersionDamaged            the stored copy of a version is not what was stored
├── VersionStoreFull          no room on disk for a version
└── VersionStoreFailed        the disk or its permissions do not let a version be stored or read

Each class carries the HTTP status and the code as data; nobody decides either by reading a message.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar


class RefusalCode(StrEnum):
    """Why a folder was refused. One word for machines; the message is for people."""

    PICKLE_REFUSED = "adapter_pickle_refused"
    UNSUPPORTED = "adapter_unsupported"
    UNKNOWN_FIELD = "adapter_unknown_field"
    KEY_UNMATCHED = "adapter_key_unmatched"
    SHAPE_MISMATCH = "adapter_shape_mismatch"
    INCOMPLETE_PAIR = "adapter_incomplete_pair"
    NONFINITE = "adapter_nonfinite"
    AMBIGUOUS_LAYOUT = "adapter_ambiguous_layout"
    WRONG_BASE = "adapter_wrong_base"
    TOO_LARGE = "adapter_too_large"
    CONFLICT = "adapter_conflict"
    CORRUPT = "adapter_corrupt"


class AdapterError(Exception):
    """Root of everything that can go wrong with an adapter."""

    status: ClassVar[int] = 400
    code: str = "adapter_error"


@dataclass(eq=False)
class AdapterRefused(AdapterError):
    """The folder cannot be served exactly, so it is not served at all.

    `feature` names the config field (with its value), `tensor` the tensor at fault; either may be None.
    """

    reason: RefusalCode
    why: str
    fix: str
    feature: str | None = None
    tensor: str | None = None

    def __post_init__(self) -> None:
        self.code = self.reason.value

    def __str__(self) -> str:
        subject = self.tensor or self.feature
        return f"{self.code}: {subject + ': ' if subject else ''}{self.why}. {self.fix}"


class AdapterNotFound(AdapterError):
    """No adapter is registered under the name, or no folder stands at the path."""

    status = 404
    code = "adapter_not_found"


class AdapterAlreadyLoaded(AdapterError):
    """The name is taken by other bytes and `load_inplace` was not asked for."""

    code = "adapter_already_loaded"


class AdapterNameInvalid(AdapterError):
    """The name is empty, too long, of other characters than allowed, or the base model's own."""

    code = "adapter_name_invalid"


class AdapterOptionInvalid(AdapterError):
    """`ignore` or `moe_lora_b_layout` is of no form that it may have, stands twice, or takes too much room."""

    code = "adapter_option_invalid"


class AdapterCapacity(AdapterError):
    """Loading would take more host memory than adapters may use (`--max-cpu-loras`, `--lora-memory`)."""

    status = 409
    code = "adapter_capacity"


class VersionDamaged(AdapterError):
    """The stored copy of a version is not what was stored; the adapter has to be loaded from its source again."""

    status = 500
    code = "adapter_version_damaged"


class VersionStoreFull(AdapterError):
    """A version was not stored, since the disk or its quota is full; what was stored before is as it was."""

    status = 507
    code = "adapter_storage_full"


class VersionStoreFailed(AdapterError):
    """A version was not stored or read, since the system refused; what was stored before is as it was."""

    status = 500
    code = "adapter_storage_failed"
