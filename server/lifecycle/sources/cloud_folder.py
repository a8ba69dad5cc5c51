"""A folder of an object store: s3://bucket/folder, gs://bucket/folder, az://container/folder, through obstore.

Imported only where obstore is installed. Credentials, region and endpoint come from the environment, as obstore
documents them (AWS_*, GOOGLE_*, AZURE_*), or from the machine's identity; what the store answers is never shown,
because it may repeat them. Knows nothing of what the files hold.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import AzureStore, GCSStore, S3Store

from adapters.errors import AdapterNotFound
from adapters.untrusted_json import shown
from server.lifecycle.sources.address import URLAddress
from server.lifecycle.sources.download import CHUNK_BYTES, RemoteFile
from server.lifecycle.sources.errors import AdapterSourceUnreachable

_STORES: dict[str, type[AzureStore] | type[GCSStore] | type[S3Store]] = {
    "s3": S3Store,
    "gs": GCSStore,
    "az": AzureStore,
}
_ALLOW_HTTP = {"s3": "AWS_ALLOW_HTTP", "gs": "GOOGLE_ALLOW_HTTP", "az": "AZURE_ALLOW_HTTP"}
_RETRIES = 2
_MAX_RETRY_SECONDS = 20


class CloudFolder:
    """`timeout` is how many seconds the store may be silent, `max_seconds` how long one file may take."""

    def __init__(self, address: URLAddress, *, timeout: float, max_seconds: float) -> None:
        self._address = address
        with _store_errors(address):
            self._store = _STORES[address.scheme](
                address.host,
                client_options={
                    # obstore would read this itself, but not where any option of the client is given.
                    "allow_http": os.environ.get(_ALLOW_HTTP[address.scheme], "").lower() in ("1", "true"),
                    "connect_timeout": timedelta(seconds=timeout),
                    "read_timeout": timedelta(seconds=timeout),
                    "timeout": timedelta(seconds=max_seconds),
                },
                retry_config={
                    "max_retries": _RETRIES,
                    "retry_timeout": timedelta(seconds=_MAX_RETRY_SECONDS),
                    "backoff": {"max_backoff": timedelta(seconds=2)},
                },
            )

    @contextmanager
    def open(self, name: str) -> Iterator[RemoteFile]:
        """As in `download.RemoteFolder`."""
        file = self._address.file(name)
        with _store_errors(file):
            found = obstore.get(self._store, "/".join(file.parts))
            num_bytes = found.meta["size"]
            stream = found.stream(min_chunk_size=CHUNK_BYTES)
        yield RemoteFile(num_bytes, _chunks(iter(stream), file))


def _chunks(stream: Iterator[bytes], file: URLAddress) -> Iterator[bytes]:
    while True:
        with _store_errors(file):
            chunk = next(stream, None)
        if chunk is None:
            return
        yield chunk


@contextmanager
def _store_errors(address: URLAddress) -> Iterator[None]:
    place = shown(f"{address.scheme}://{address.host}/{'/'.join(address.parts)}")
    try:
        yield
    except (FileNotFoundError, PermissionDeniedError, UnauthenticatedError):
        why = "is not there, or the server's credentials may not read it"
        raise AdapterNotFound(f"{place} {why}") from None
    except (BaseError, OSError, ValueError) as error:
        raise AdapterSourceUnreachable(f"{place} cannot be read{_reason(error)}") from None


def _reason(error: Exception) -> str:
    """What may be told of an error whose text may hold anything."""
    text = str(error)
    status = re.search(r"status(?: code)?:? (\d{3})\b", text)
    if status:
        return f" (status {status[1]})"
    known = {
        "timed out": "it did not answer in time",
        "TimedOut": "it did not answer in time",
        "onnect": "no connection",
    }
    return next((f" ({meaning})" for part, meaning in known.items() if part in text), "")
