"""An adapter's folder as the multipart body of one request, read piece by piece. Knows nothing of HTTP."""

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from adapters.adapter_folder import AdapterFolder
from adapters.errors import AdapterError
from adapters.sent_files import FilesNotWhole, names_to_send

_PIECE_BYTES = 1024**2


class UploadImpossible(Exception):
    """The folder cannot be sent; the message is for a person."""


@dataclass(frozen=True, slots=True)
class _Part:
    head: bytes
    path: Path
    num_bytes: int


@dataclass(frozen=True, slots=True)
class AdapterUpload:
    """`num_bytes` is the length of the whole body."""

    content_type: str
    parts: tuple[_Part, ...]
    tail: bytes

    @classmethod
    def of(cls, folder: Path) -> "AdapterUpload":
        """Everything in the folder that a load reads. Raises UploadImpossible when a file is missing or of no use."""
        boundary = secrets.token_hex(16)
        parts = tuple(_part(folder / name, boundary, is_first=at == 0) for at, name in enumerate(_names(folder)))
        return cls(f"multipart/form-data; boundary={boundary}", parts, f"\r\n--{boundary}--\r\n".encode())

    @property
    def num_bytes(self) -> int:
        return sum(len(part.head) + part.num_bytes for part in self.parts) + len(self.tail)

    def pieces(self, sent: Callable[[int], None]) -> Iterator[bytes]:
        """The body in order; `sent` is told the length of a piece when the next one is asked for."""
        for piece in self._pieces():
            yield piece
            sent(len(piece))

    def _pieces(self) -> Iterator[bytes]:
        for part in self.parts:
            yield part.head
            yield from _contents(part)
        yield self.tail


def _names(folder: Path) -> list[str]:
    try:
        with AdapterFolder.find(folder) as found:
            return names_to_send(found)
    except (AdapterError, FilesNotWhole) as error:
        raise UploadImpossible(str(error)) from error


def _part(path: Path, boundary: str, *, is_first: bool) -> _Part:
    try:
        num_bytes = path.stat().st_size
    except OSError as error:
        raise UploadImpossible(f"{path} cannot be read: {error.strerror}") from error
    head = (
        f"{'' if is_first else chr(13) + chr(10)}--{boundary}\r\n"
        f'Content-Disposition: form-data; name="files"; filename="{path.name}"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    )
    return _Part(head.encode(), path, num_bytes)


def _contents(part: _Part) -> Iterator[bytes]:
    """As many bytes as the file had when the length of the body was told."""
    left = part.num_bytes
    with _opened(part.path) as file:
        while left:
            piece = file.read(min(left, _PIECE_BYTES))
            if not piece:
                raise UploadImpossible(f"{part.path} became shorter while it was sent; send it again")
            left -= len(piece)
            yield piece


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise UploadImpossible(f"{path} cannot be read: {error.strerror}") from error
