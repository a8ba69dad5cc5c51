"""One multipart/form-data body with the files of an adapter, taken apart as its bytes come.

Pushes the bytes of each file to whoever keeps them, and holds none itself. Headers, their number and the number of
parts are bounded; a part that is no file of an adapter is refused by its name. Knows nothing of disks, nor whether the
files belong together.
"""

from collections.abc import Callable, Mapping

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from adapters.sent_files import ACCEPTED, MAX_FILES, may_be_sent
from adapters.untrusted_json import shown
from server.lifecycle.sources.errors import AdapterUploadInvalid

FRAME_BYTES = 1 << 16
"""What boundaries, headers and line ends of a body may take beside the files; a part needs some 200 to 400."""
_MAX_HEADER_BYTES = 1 << 12


class MultipartUpload:
    """`keep` gets (file name, some bytes of it), first with no bytes when the file begins."""

    def __init__(self, content_type: str, keep: Callable[[str, memoryview], None]) -> None:
        self._keep = keep
        self._parser = MultipartParser(
            _boundary(content_type),
            {
                "on_part_begin": self._begin_part,
                "on_header_field": self._add_to_field,
                "on_header_value": self._add_to_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._begin_file,
                "on_part_data": self._add_to_file,
                "on_end": self._end,
            },
        )
        self._headers: dict[str, str] = {}
        self._field = self._value = b""
        self._header_bytes = 0
        self._file = ""
        self._seen: list[str] = []
        self._is_complete = False

    def feed(self, data: bytes) -> None:
        """Raises AdapterUploadInvalid, and what `keep` raises."""
        try:
            self._parser.write(data)
        except (FormParserError, UnicodeError, ValueError):
            raise AdapterUploadInvalid("the body is not well-formed multipart/form-data") from None

    def finish(self) -> None:
        """Raises AdapterUploadInvalid unless the body came to its end."""
        if not self._is_complete:
            raise AdapterUploadInvalid("the upload was cut off before its end; nothing of it was kept")

    def _begin_part(self) -> None:
        self._headers = {}
        self._header_bytes = 0

    def _add_to_field(self, data: bytes, start: int, end: int) -> None:
        self._field += self._bounded(data, start, end)

    def _add_to_value(self, data: bytes, start: int, end: int) -> None:
        self._value += self._bounded(data, start, end)

    def _bounded(self, data: bytes, start: int, end: int) -> bytes:
        self._header_bytes += end - start
        if self._header_bytes > _MAX_HEADER_BYTES:
            raise AdapterUploadInvalid(f"the headers of a part take more than {_MAX_HEADER_BYTES} bytes")
        return data[start:end]

    def _end_header(self) -> None:
        self._headers[self._field.decode("latin-1").lower()] = self._value.decode("utf-8")
        self._field = self._value = b""

    def _begin_file(self) -> None:
        _, options = parse_options_header(self._headers.get("content-disposition"))
        # A form's field may have any name if its file has the right one; curl -F and browsers send both.
        name = options.get(b"filename", options.get(b"name", b"")).decode("latin-1")
        if not may_be_sent(name):
            raise AdapterUploadInvalid(f"{shown(name)!r} is not one of the files of an upload: {ACCEPTED}")
        if name in self._seen:
            raise AdapterUploadInvalid(f"{name} is in the upload twice")
        if len(self._seen) == MAX_FILES:
            raise AdapterUploadInvalid(f"the upload has more than {MAX_FILES} files")
        if self._headers.get("content-transfer-encoding", "binary").lower() not in ("binary", "7bit", "8bit"):
            raise AdapterUploadInvalid(f"{name} must be sent as it is, without a transfer encoding")
        self._seen.append(name)
        self._file = name
        self._keep(name, memoryview(b""))

    def _add_to_file(self, data: bytes, start: int, end: int) -> None:
        self._keep(self._file, memoryview(data)[start:end])

    def _end(self) -> None:
        self._is_complete = True


def _boundary(content_type: str) -> bytes:
    kind, options = parse_options_header(content_type)
    boundary: Mapping[bytes, bytes] | bytes | None = options.get(b"boundary")
    if kind != b"multipart/form-data" or not isinstance(boundary, bytes) or not 0 < len(boundary) <= 70:
        raise AdapterUploadInvalid("an upload is one multipart/form-data request with a boundary of 1 to 70 characters")
    return boundary
