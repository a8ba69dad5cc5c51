"""Folders on the server's own disk, opened beneath the allowed roots by descriptor; nothing is copied.

With roots, a source's text must lie below one of them, and the walk from the root down follows a link only if it stays
below (`adapters/open_folder.py`). Without roots any folder that the server can read will do. Roots are trusted, and
looked up anew for each load, so that a volume may be remounted. Knows no URLs.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from adapters.adapter_folder import AdapterFolder
from adapters.errors import AdapterNotFound
from adapters.open_folder import LeadsOutside, OpenFolder
from adapters.untrusted_json import shown
from server.lifecycle.sources.errors import AdapterSourceNotAllowed


class LocalFolders:
    """`roots` empty = anywhere."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = tuple(Path(os.path.abspath(root)) for root in roots)

    def check(self, path: str) -> None:
        """Raises AdapterSourceNotAllowed by the path's text alone; what is on disk is seen when it is opened."""
        if self._roots:
            self._placed(path)

    def open(self, path: str) -> AdapterFolder:
        """Raises AdapterSourceNotAllowed, AdapterNotFound, AdapterRefused."""
        if not self._roots:
            return AdapterFolder.find(Path(path))
        root, below = self._placed(path)
        try:
            with OpenFolder.at(root) as outer:
                folder = outer.descend(below)
        except LeadsOutside:
            raise _not_allowed(path) from None
        except (OSError, ValueError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a path"
            raise AdapterNotFound(f"no adapter folder at {shown(path)}: {reason}") from None
        return AdapterFolder.within_folder(folder, refuse_hard_links=True)

    def _placed(self, path: str) -> tuple[Path, str]:
        """(root, path below it), the innermost root that fits as it was given or with its links resolved."""
        parts = Path(os.getcwd(), path).parts
        if ".." in parts:
            raise _not_allowed(path)
        fitting = [
            (root, len(spelled.parts))
            for root in self._roots
            for spelled in {root, Path(os.path.realpath(root))}
            if parts[: len(spelled.parts)] == spelled.parts
        ]
        if not fitting:
            raise _not_allowed(path)
        root, length = max(fitting, key=lambda fit: fit[1])
        return root, "/".join(parts[length:])


def _not_allowed(path: str) -> AdapterSourceNotAllowed:
    return AdapterSourceNotAllowed(
        f"{shown(path)!r} is outside the folders that adapters may be loaded from, has '..' in it, or is a link that "
        "leads out of them"
    )
