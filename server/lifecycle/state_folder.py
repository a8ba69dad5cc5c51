"""The folder in which a server keeps its adapters and their names; a temporary one when none was given.

    catalogue.db   names, versions, aliases        versions/   prepared weights
    uploads/       what was sent over HTTP         staging/    downloads under way
    server-id      what its server is known as to others on the same database

Knows where each part lies, and nothing of what is in it.
"""

import shutil
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class StateFolder:
    path: Path
    is_temporary: bool

    @classmethod
    def at(cls, path: Path | None) -> "StateFolder":
        """Raises OSError when it can be neither found nor made."""
        if path is None:
            return cls(Path(tempfile.mkdtemp(prefix="loramux-")), True)
        absolute = path.expanduser().absolute()
        absolute.mkdir(parents=True, exist_ok=True, mode=0o700)
        return cls(absolute, False)

    @property
    def catalogue_url(self) -> str:
        return f"sqlite:///{self.path / 'catalogue.db'}"

    @property
    def versions(self) -> Path:
        return self.path / "versions"

    @property
    def uploads(self) -> Path:
        return self.path / "uploads"

    @property
    def staging(self) -> Path:
        return self.path / "staging"

    @property
    def folder_memory(self) -> Path:
        return self.path / "adapter-dir.json"

    def server_id(self) -> str:
        """What this folder's server is known as, made at the first call. Raises OSError."""
        path = self.path / "server-id"
        try:
            with path.open("x") as file:
                file.write(uuid.uuid4().hex)
        except FileExistsError:
            pass
        return path.read_text()

    def close(self) -> None:
        """Removes a temporary one."""
        if self.is_temporary:
            shutil.rmtree(self.path, ignore_errors=True)
