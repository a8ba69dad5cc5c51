"""Which URLs adapters may be fetched from: prefixes, compared part by part after normalisation, never as text.

`https://host/models` permits `https://HOST:443/models/sql`, and neither `https://host/models-private` nor
`https://host.example.com/models`. Knows nothing of local folders.
"""

from collections.abc import Sequence

from server.lifecycle.sources.address import HubAddress, RemoteAddress, parse_url, without_secrets
from server.lifecycle.sources.errors import AdapterSourceNotAllowed

DEFAULT_ALLOWED_URLS = ("hf://",)


class AllowList:
    """A prefix that cannot be read raises AdapterSourceInvalid. `hf://` alone stands for every repo of the hub."""

    def __init__(self, prefixes: Sequence[str]) -> None:
        self._prefixes = [parse_url(prefix) for prefix in prefixes]

    def permits(self, address: RemoteAddress) -> bool:
        return any(_is_prefix(prefix, address) for prefix in self._prefixes)

    def require(self, address: RemoteAddress, source: str) -> None:
        """Raises AdapterSourceNotAllowed."""
        if not self.permits(address):
            raise AdapterSourceNotAllowed(
                f"{without_secrets(source)!r} is not under a URL that adapters may be fetched from (--allowed-urls)"
            )


def _is_prefix(prefix: RemoteAddress, address: RemoteAddress) -> bool:
    if address.parts[: len(prefix.parts)] != prefix.parts:
        return False
    if isinstance(prefix, HubAddress):
        return isinstance(address, HubAddress) and prefix.revision in (None, address.revision)
    if isinstance(address, HubAddress):
        return False
    return (prefix.scheme, prefix.host, prefix.port) == (address.scheme, address.host, address.port)
