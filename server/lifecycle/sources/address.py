"""A source string → what it names, in one normal form; the string itself is used for nothing else afterwards.

A URL is taken apart here and put together again from the parts, so that what is checked is what is asked for. Whatever
readers of URLs disagree on is refused instead of interpreted: user names, queries, fragments, backslashes, `.` and
`..`, `//`, text that is percent-encoded twice. Knows nothing of what is allowed, touches neither disk nor network.
"""

import re
from dataclasses import dataclass
from urllib.parse import quote, unquote_to_bytes

from adapters.errors import AdapterNotFound
from adapters.untrusted_json import shown
from server.lifecycle.sources.errors import AdapterSourceInvalid

MAX_SOURCE_LENGTH = 4096
_DEFAULT_PORTS = {"http": 80, "https": 443}
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_WEB = re.compile(r"https?://([^/?#]*)(/[^?#]*)?")
_AUTHORITY = re.compile(r"([a-z0-9](?:[a-z0-9.-]*[a-z0-9])?|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?")
_BUCKET = re.compile(r"(?:s3|gs|az)://([a-z0-9][a-z0-9._-]{1,254})(/.*)?")
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_HUB_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
_UPLOAD_ID = re.compile(r"[0-9a-f]{64}")
_ENCODED = re.compile(r"%[0-9A-Fa-f]{2}")
_LIKE_WEB = re.compile(r"[^\w./~-]*https?:[/\\]*", re.IGNORECASE)  # also misspelled: quoted, after a blank, one slash
_USER = re.compile(r"(.*)(?:@|%40|[\uff20\ufe6b])", re.IGNORECASE | re.DOTALL)  # the last two are read as @ by some


@dataclass(frozen=True, slots=True)
class LocalAddress:
    path: str


@dataclass(frozen=True, slots=True)
class UploadAddress:
    upload_id: str


@dataclass(frozen=True, slots=True)
class HubAddress:
    """`parts` are org and repo, then the subfolder; an allow-list's prefix may have fewer."""

    parts: tuple[str, ...]
    revision: str | None = None

    @property
    def repo(self) -> str:
        return "/".join(self.parts[:2])

    @property
    def subfolder(self) -> tuple[str, ...]:
        return self.parts[2:]


@dataclass(frozen=True, slots=True)
class URLAddress:
    """`host` is the bucket or container with s3, gs and az; `port` None is the scheme's own. `parts` are decoded."""

    scheme: str
    host: str
    port: int | None
    parts: tuple[str, ...]

    @property
    def url(self) -> str:
        """Of http and https."""
        port = "" if self.port is None else f":{self.port}"
        return f"{self.scheme}://{self.host}{port}/{'/'.join(quote(part, safe='') for part in self.parts)}"

    def file(self, name: str) -> "URLAddress":
        return URLAddress(self.scheme, self.host, self.port, (*self.parts, name))


RemoteAddress = HubAddress | URLAddress
Address = LocalAddress | UploadAddress | RemoteAddress


def parse_source(source: str) -> Address:
    """Raises AdapterSourceInvalid; for what is no path either, AdapterNotFound."""
    if not source or "\0" in source or len(source) > MAX_SOURCE_LENGTH or not _is_encodable(source):
        raise AdapterNotFound(f"{without_secrets(source)!r} is no local folder")
    if source.startswith("upload:"):
        return _upload(source)
    if source[:5].lower() == "file:":
        return LocalAddress(_file_path(source))
    scheme = _SCHEME.match(source)
    if scheme is None and _LIKE_WEB.match(source):
        raise _invalid(source, "a URL here is https://host/path, and nothing before it")
    if scheme is None:
        return LocalAddress(source)
    address = parse_url(source)
    if isinstance(address, HubAddress) and len(address.parts) < 2:
        raise _invalid(source, "a repo is written hf://org/repo, hf://org/repo@revision or hf://org/repo/subfolder")
    return address


def parse_url(source: str) -> RemoteAddress:
    """Raises AdapterSourceInvalid. An hf:// URL may be as short as an allow-list's prefix is."""
    match = _SCHEME.match(source)
    scheme = match[1].lower() if match else ""
    rest = source[len(scheme) :]
    if scheme == "hf":
        return _hub(source)
    if scheme in _DEFAULT_PORTS:
        return _web(scheme, scheme + rest, source)
    if scheme in ("s3", "gs", "az"):
        return _bucket(scheme, scheme + rest, source)
    raise _invalid(source, "its scheme is none of file, hf, s3, gs, az, http and https")


def _upload(source: str) -> UploadAddress:
    upload_id = source.removeprefix("upload:")
    if not _UPLOAD_ID.fullmatch(upload_id):
        raise _invalid(source, "an upload's id is 64 hexadecimal digits")
    return UploadAddress(upload_id)


def _file_path(source: str) -> str:
    """file:///path and file://localhost/path; the path is percent-decoded once."""
    rest = source[5:]
    host, slash, path = rest[2:].partition("/") if rest.startswith("//") else ("", rest[:1], rest[1:])
    if slash != "/" or host.lower() not in ("", "localhost"):
        raise _invalid(source, "a file URL is written file:///path, without a host")
    if "?" in path or "#" in path:
        raise _invalid(source, "a file URL has neither query nor fragment")
    return "/" + "/".join(_decoded(part, source, may_be_empty=True) for part in path.split("/"))


def _hub(source: str) -> HubAddress:
    """hf://org/repo[@revision][/subfolder], and its beginnings; a revision's slashes are written %2F."""
    repo, at, rest = source[5:].partition("@")
    revision, _, subfolder = rest.partition("/")
    parts = [part for part in repo.removesuffix("/").split("/") if repo]
    if at and len(parts) != 2:
        raise _invalid(source, "a revision stands behind the repo: hf://org/repo@revision")
    if at:
        revision = _decoded(revision, source, may_hold_slash=True)
        if not _HUB_REVISION.fullmatch(revision) or ".." in revision or "//" in revision:
            raise _invalid(source, "a revision is a branch, tag or commit")
        parts += [part for part in subfolder.removesuffix("/").split("/") if subfolder]
    if not all(_HUB_NAME.fullmatch(part) and ".." not in part for part in parts[:2]):
        raise _invalid(source, "org and repo have letters, digits and . _ -")
    return HubAddress(tuple(_decoded(part, source) for part in parts), revision if at else None)


def _web(scheme: str, url: str, source: str) -> URLAddress:
    if not source.isascii() or not source.isprintable() or re.search(r'[\s\\"<>^`{|}]', source):
        raise _invalid(source, "a URL has printable ASCII characters, others percent-encoded or in punycode")
    match = _WEB.fullmatch(url)
    if match is None:
        raise _invalid(source, "a URL here is https://host/path, without query and fragment")
    authority = _AUTHORITY.fullmatch(match[1].lower())
    if authority is None or ".." in authority[1]:
        raise _invalid(source, "a URL here is https://host[:port]/path, without a user name")
    port = int(authority[2]) if authority[2] else _DEFAULT_PORTS[scheme]
    if not 0 < port < 65536:
        raise _invalid(source, "there is no such port")
    parts = _parts(match[2] or "", source)
    return URLAddress(scheme, authority[1], None if port == _DEFAULT_PORTS[scheme] else port, parts)


def _bucket(scheme: str, url: str, source: str) -> URLAddress:
    """A key is taken as it stands, not percent-decoded, as the tools of these stores do."""
    match = _BUCKET.fullmatch(url)
    if match is None or ".." in match[1]:
        raise _invalid(source, f"a URL here is {scheme}://bucket/folder, the bucket in lower case")
    if re.search(r"[%?#\\]", match[2] or "") or not source.isprintable():
        raise _invalid(source, "the folder's name holds a character that stores read differently (% ? # \\)")
    return URLAddress(scheme, match[1], None, _parts(match[2] or "", source))


def _parts(path: str, source: str) -> tuple[str, ...]:
    path = path.removeprefix("/").removesuffix("/")
    return tuple(_decoded(part, source) for part in path.split("/")) if path else ()


def _decoded(part: str, source: str, *, may_be_empty: bool = False, may_hold_slash: bool = False) -> str:
    """One component of a path, decoded once; refused when it then is anything but the name of one file or folder."""
    try:
        text = unquote_to_bytes(part).decode("utf-8")
    except UnicodeError:
        raise _invalid(source, "a name in it is not UTF-8") from None
    is_encoded = text != part
    if (not text and not may_be_empty) or text in (".", "..") or (is_encoded and _ENCODED.search(text)):
        raise _invalid(source, "its path has an empty name, '.', '..' or a name that is percent-encoded twice")
    if ("/" in text and not may_hold_slash) or "\\" in text or not text.isprintable():
        raise _invalid(source, "a name in it holds a slash, a backslash or a control character")
    return text


def _is_encodable(source: str) -> bool:
    try:
        source.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _invalid(source: str, why: str) -> AdapterSourceInvalid:
    return AdapterSourceInvalid(f"{without_secrets(source)!r} is not a source: {why}")


def without_secrets(source: str) -> str:
    """A source as messages may show it: what may be a password, a signature or a token is left out.

    A password may hold anything, `/`, `?` and `@` included: of a web URL all before the last @ is left out, even where
    that was a part of the path. Other URLs have an @ of their own (a revision, a key): there it ends a user's name only
    in the first part, or behind a colon.
    """
    web = _LIKE_WEB.match(source)
    start = web.end() if web else source.find("://") + len("://")
    if not web and "://" not in source:
        return shown(source)
    rest = source[start:]
    if (user := _USER.match(rest)) and (web or ":" in user[1] or _USER.match(rest.partition("/")[0])):
        rest = f"…@{rest[user.end() :]}"
    return shown(source[:start] + re.sub(r"[?#].*", "?…", rest, flags=re.DOTALL))
