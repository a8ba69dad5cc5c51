"""What can go wrong with the catalogue; status and code are data on the class.

CatalogueError
├── CatalogueConflict     409 adapter_conflict: somebody else was first at the name, or at what an alias leads to
├── CatalogueUnavailable  503 catalogue_unavailable: the file or the server is away, full, locked or read-only
├── CatalogueRefused      500: not a catalogue this release can use (its URL, its driver, its schema)
└── CatalogueHistoryGone  500: asked for changes older than those kept; take a snapshot
"""

from server.errors import ServerError


class CatalogueError(ServerError):
    """Root. Whatever raised it changed nothing, but where `CatalogueUnavailable` says that this is not known."""

    code = "catalogue_error"


class CatalogueConflict(CatalogueError):
    status = 409
    error_type = "invalid_request_error"
    code = "adapter_conflict"


class CatalogueUnavailable(CatalogueError):
    """`outcome_known` is False when the connection broke in the middle of a commit and the server cannot be asked."""

    status = 503
    code = "catalogue_unavailable"
    retry_after = 5

    def __init__(self, message: str, *, outcome_known: bool = True) -> None:
        super().__init__(message)
        self.outcome_known = outcome_known


class CatalogueRefused(CatalogueError):
    code = "catalogue_refused"


class CatalogueHistoryGone(CatalogueError):
    code = "catalogue_history_gone"
