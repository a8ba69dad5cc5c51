"""Why a source was not fetched or an upload not kept; further leaves of adapters/errors.py's tree.

AdapterError
├── AdapterSourceInvalid        the text is no source: 400
├── AdapterSourceUnsupported    a source of a kind this server was not installed for: 400
├── AdapterSourceNotAllowed     outside the folders and URLs that adapters may be loaded from: 403
├── AdapterSourceUnreachable    a remote source does not answer, or wrongly: 503, worth another try
├── AdapterUploadInvalid        what was sent is not the files of one adapter: 400
├── AdapterStorageFull          no room on disk or in the upload quota: 507
└── AdapterStorageFailed        the disk failed: 500

What is not there is AdapterNotFound, what is over a limit AdapterRefused (adapter_too_large), as with any folder. No
message repeats what a remote end said, which may hold credentials.
"""

from adapters.errors import AdapterError, AdapterRefused, RefusalCode


class AdapterSourceInvalid(AdapterError):
    """The text is neither a path nor a URL of a kind that is known."""

    code = "adapter_source_invalid"


class AdapterSourceUnsupported(AdapterError):
    """The kind of source is known, and what reads it is not installed or not switched on."""

    code = "adapter_source_unsupported"


class AdapterSourceNotAllowed(AdapterError):
    """The source is outside what adapters may be loaded from."""

    status = 403
    code = "adapter_source_not_allowed"


class AdapterSourceUnreachable(AdapterError):
    """The remote end could not be reached, broke off, or answered with an error of its own; later it may not."""

    status = 503
    code = "adapter_source_unreachable"
    retry_after = 10  # seconds


class AdapterUploadInvalid(AdapterError):
    """The request's body is not multipart with the files of one adapter and no others, or was cut off."""

    code = "adapter_upload_invalid"


class AdapterStorageFull(AdapterError):
    """No room for it: the disk, or the quota of all uploads."""

    status = 507
    code = "adapter_storage_full"


class AdapterStorageFailed(AdapterError):
    """Writing to the server's own disk failed."""

    status = 500
    code = "adapter_storage_failed"


def too_large(what: str, num_bytes: int | None, limit: int, flag: str) -> AdapterRefused:
    """`num_bytes` None: more than the limit, nobody knows by how much."""
    size = "more" if num_bytes is None else f"{num_bytes} bytes"
    why = f"{what} has {size}, over {flag}={limit}"
    fix = "The limit is fixed: save the file without what an adapter does not need"
    if flag == "max_adapter_bytes":
        fix = f"Restart the server with a larger --{flag.replace('_', '-')}, or save the LoRA tensors alone"
    return AdapterRefused(RefusalCode.TOO_LARGE, why, fix, feature=flag)
