"""What can go wrong with an adapter's life beyond the adapter itself; status and code are data on the class.

AdapterError
├── AliasNotFound          404 alias_not_found, an AdapterNotFound
├── NameConflict           409 adapter_conflict: the name is an alias's, or an alias leads to it
│   └── ChangedElsewhere   … or another server on the same catalogue changed it first
├── NoPreviousVersion      409 adapter_no_previous_version
├── SourceChanged          409 adapter_source_changed: at the source stands another version than was registered
└── AdapterLoadCancelled   409 adapter_load_cancelled
ServerError
├── AdapterFailed          400 adapter_failed: the adapter that a request names could not be loaded
└── AdapterNotReady        503 adapter_not_ready, with Retry-After: the weights were not in host memory in time
    └── HostTierFull       … because no room came free: every adapter there was pinned or in use
"""

from adapters.errors import AdapterError, AdapterNotFound
from server.errors import ServerError


class AliasNotFound(AdapterNotFound):
    code = "alias_not_found"


class NameConflict(AdapterError):
    status = 409
    code = "adapter_conflict"


class ChangedElsewhere(NameConflict):
    """What the other server made of the name is known here by now."""


class NoPreviousVersion(AdapterError):
    status = 409
    code = "adapter_no_previous_version"


class SourceChanged(AdapterError):
    status = 409
    code = "adapter_source_changed"


class AdapterLoadCancelled(AdapterError):
    status = 409
    code = "adapter_load_cancelled"


class AdapterFailed(ServerError):
    status = 400
    error_type = "invalid_request_error"
    code = "adapter_failed"


class AdapterNotReady(ServerError):
    """The adapter is known and sound; asking again later is likely to succeed."""

    status = 503
    code = "adapter_not_ready"
    retry_after = 2


class HostTierFull(AdapterNotReady):
    retry_after = 5
