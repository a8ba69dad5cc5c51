"""A repo on the Hugging Face hub, or a subfolder of it, at one commit, through huggingface_hub's own client.

Its endpoint, token, proxies and offline mode count (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, or what is passed). Files
are streamed instead of put into its cache, so that nothing is written outside the staging folder, sizes hold while
bytes come, and a fetch can be stopped; that leaves out hf_xet, too. Nothing is sent but the requests for the files.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus

from huggingface_hub import HfApi, get_session, hf_hub_url
from huggingface_hub.errors import (
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented, not in its __all__

from adapters.errors import AdapterError, AdapterNotFound
from adapters.untrusted_json import shown
from server.lifecycle.sources.address import HubAddress
from server.lifecycle.sources.allow_list import AllowList
from server.lifecycle.sources.download import FetchStopped, RemoteFile
from server.lifecycle.sources.errors import AdapterSourceNotAllowed, AdapterSourceUnreachable

_USER_AGENT = {"user-agent": "loramux"}
_NOT_FOR_US = {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND}


class HubFolder:
    """Asks the hub for the commit and the files at once. `token` None: what huggingface_hub finds; `timeout` in s.

    Raises AdapterNotFound, AdapterSourceNotAllowed, AdapterSourceUnreachable.
    """

    def __init__(
        self, address: HubAddress, allow_list: AllowList, *, endpoint: str | None, token: str | None, timeout: float
    ) -> None:
        self._address = address
        self._endpoint = endpoint
        self._token = token
        self._timeout = timeout
        api = HfApi(endpoint=endpoint, token=token, headers=_USER_AGENT)
        with _hub_errors(self._place()):
            info = api.model_info(address.repo, revision=address.revision, files_metadata=True, timeout=timeout)
            self._commit = str(info.sha)
            self._sizes = {file.rfilename: file.size for file in info.siblings or ()}
            name = tuple(str(info.id).split("/"))
        self._check_not_moved(name, allow_list)

    def _check_not_moved(self, name: tuple[str, ...], allow_list: AllowList) -> None:
        """A repo that was renamed is answered for under its new name, which may be anybody's."""
        if tuple(map(str.lower, name)) == tuple(part.lower() for part in self._address.parts[:2]):
            return
        moved = HubAddress((*name, *self._address.subfolder), self._address.revision)
        if not allow_list.permits(moved):
            raise AdapterSourceNotAllowed(
                f"{self._place()} is now {shown('/'.join(name))} on the hub, which is not under a URL that adapters "
                "may be fetched from (--allowed-urls)"
            )

    @contextmanager
    def open(self, name: str) -> Iterator[RemoteFile]:
        """As in `download.RemoteFolder`."""
        path = "/".join((*self._address.subfolder, name))
        if path not in self._sizes:
            raise AdapterNotFound(f"no {shown(name)} in {self._place()}")
        url = hf_hub_url(self._address.repo, path, revision=self._commit, endpoint=self._endpoint)
        headers = build_hf_headers(token=self._token, headers={**_USER_AGENT, "accept-encoding": "identity"})
        with _hub_errors(self._place(name)):
            # The client itself takes the token off where the hub redirects to another host for the bytes.
            request = get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=self._timeout)
            with request as reply:
                if reply.status_code in _NOT_FOR_US:
                    raise AdapterNotFound(f"{self._place(name)} may not be read with the server's token")
                if reply.status_code != HTTPStatus.OK:
                    raise AdapterSourceUnreachable(f"{self._place(name)}: the hub said status {reply.status_code}")
                yield RemoteFile(self._sizes[path], reply.iter_raw())

    def _place(self, name: str = "") -> str:
        revision = f"@{self._address.revision}" if self._address.revision else ""
        return shown(f"hf://{self._address.repo}{revision}{''.join('/' + p for p in self._address.subfolder)}/{name}")


@contextmanager
def _hub_errors(place: str) -> Iterator[None]:
    """Whatever the client raises: its HTTP library differs between versions, and an answer may be anything."""
    try:
        yield
    except (AdapterError, FetchStopped):
        raise
    except RevisionNotFoundError:
        raise AdapterNotFound(f"{place}: the repo has no such revision") from None
    except (RepositoryNotFoundError, RemoteEntryNotFoundError):
        raise AdapterNotFound(f"{place}: there is no such repo, or the server's token may not read it") from None
    except OfflineModeIsEnabled:
        raise AdapterSourceUnreachable(f"{place}: the server is set to be offline (HF_HUB_OFFLINE)") from None
    except HfHubHTTPError as error:
        raise AdapterSourceUnreachable(f"{place}: the hub said status {error.response.status_code}") from None
    except Exception as error:
        raise AdapterSourceUnreachable(f"{place}: the hub cannot be reached ({type(error).__name__})") from None
