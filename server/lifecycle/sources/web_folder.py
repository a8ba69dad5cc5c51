"""A folder of a web server, by HTTP or HTTPS: `<url>/adapter_config.json`, `<url>/adapter_model.safetensors`.

Redirects are followed only to where the allow-list permits, which is why this does not go through obstore: that follows
any. No credentials are sent. Proxies are taken from the environment. Knows nothing of what the files hold.
"""

import http.client
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import Message
from typing import IO
from urllib.error import HTTPError
from urllib.parse import quote

from adapters.errors import AdapterNotFound
from adapters.untrusted_json import shown
from server.lifecycle.sources.address import URLAddress, parse_url, without_secrets
from server.lifecycle.sources.allow_list import AllowList
from server.lifecycle.sources.download import CHUNK_BYTES, RemoteFile
from server.lifecycle.sources.errors import AdapterSourceInvalid, AdapterSourceNotAllowed, AdapterSourceUnreachable
from server.lifecycle.sources.timed_http import TimedHandler

_NOT_FOR_US = {401, 403, 404, 407, 410, 451}


class WebFolder:
    """`timeout` is how many seconds the server may be silent, `max_seconds` how long all files together may take."""

    def __init__(self, address: URLAddress, allow_list: AllowList, *, timeout: float, max_seconds: float) -> None:
        self._address = address
        self._timeout = timeout
        self._opener = urllib.request.OpenerDirector()  # build_opener's would also read file:, ftp: and data: URLs
        for handler in (
            urllib.request.ProxyHandler(),
            TimedHandler(time.monotonic() + max_seconds),
            urllib.request.HTTPErrorProcessor(),
            urllib.request.HTTPDefaultErrorHandler(),
            _Redirects(allow_list),
        ):
            self._opener.add_handler(handler)

    @contextmanager
    def open(self, name: str) -> Iterator[RemoteFile]:
        """As in `download.RemoteFolder`; also raises AdapterSourceNotAllowed, for a redirect."""
        url = self._address.file(name).url
        headers = {"User-Agent": "loramux", "Accept": "*/*", "Accept-Encoding": "identity"}
        with (
            _network_errors(url),
            self._opener.open(urllib.request.Request(url, headers=headers), timeout=self._timeout) as reply,
        ):
            if reply.status != 200 or reply.headers.get("Content-Encoding", "identity").lower() != "identity":
                raise AdapterSourceUnreachable(f"{shown(url)} was not sent as it is (status {reply.status})")
            yield RemoteFile(_content_length(reply), _chunks(reply, url))


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = 5

    def __init__(self, allow_list: AllowList) -> None:
        self._allow_list = allow_list

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> urllib.request.Request | None:
        fp.close()  # or the base class would read a body of any length into memory
        plain, question, query = newurl.partition("?")  # a server may hand out signed URLs
        try:
            address = parse_url(plain)
        except AdapterSourceInvalid:
            address = None
        if not isinstance(address, URLAddress) or not self._allow_list.permits(address):
            raise AdapterSourceNotAllowed(
                f"{without_secrets(req.full_url)} redirects out of the URLs that adapters may be fetched from "
                "(--allowed-urls)"
            )
        target = address.url + question + quote(query, safe="%/?:@!$&'()*+,;=-._~")
        return super().redirect_request(req, fp, code, msg, headers, target)  # type: ignore[arg-type]


def _content_length(reply: http.client.HTTPResponse) -> int | None:
    text = reply.headers.get("Content-Length", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None


def _chunks(reply: http.client.HTTPResponse, url: str) -> Iterator[bytes]:
    while True:
        with _network_errors(url):
            chunk = reply.read1(CHUNK_BYTES)  # what has come, so that a stop is seen soon
        if not chunk:
            return
        yield chunk


@contextmanager
def _network_errors(url: str) -> Iterator[None]:
    try:
        yield
    except HTTPError as error:
        error.close()
        if error.code in _NOT_FOR_US:
            raise AdapterNotFound(f"{shown(url)} is not there, or not for everybody (status {error.code})") from None
        raise AdapterSourceUnreachable(f"{shown(url)} was answered with status {error.code}") from None
    except TimeoutError:
        raise AdapterSourceUnreachable(f"{shown(url)} did not answer in time") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        kind = type(reason if isinstance(reason, BaseException) else error).__name__
        raise AdapterSourceUnreachable(f"{shown(url)} cannot be read: {kind}") from None
