"""A folder held open, and the only way to what lies below it: by descriptor, one name at a time.

Every step is an `openat` with O_NOFOLLOW. A link is read and walked like the rest of the path, `..` goes back to the
descriptor the walk came from, and nothing goes above the boundary, the folder the walk began at. What somebody renames
or links there meanwhile can change what is found, never whether it lies inside: as with `openat2` and RESOLVE_BENEATH,
which older kernels and many containers do not have. Knows nothing of adapters.
"""

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

MAX_LINKS = 16
MAX_STEPS = 128
"""Names a walk may take, links included, so that links to links end."""

_NOFOLLOW = os.O_NOFOLLOW | os.O_CLOEXEC
_AS_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | _NOFOLLOW  # O_PATH: no leave to list is needed


class LeadsOutside(OSError):
    """A path or a link leads above the boundary, or to a part of it that was not asked for."""

    def __init__(self) -> None:
        super().__init__(errno.EXDEV, "it leads out")


class NotAFile(OSError):
    """There is something else than a regular file: a folder, a device, a FIFO, a socket."""

    def __init__(self) -> None:
        super().__init__(errno.EINVAL, "is not a regular file")


@dataclass(frozen=True, slots=True)
class _Step:
    name: str
    descriptor: int


Parts = tuple[str, ...]
"""Names below the boundary, outermost first."""


class OpenFolder:
    """Made by `at` and `descend`; must be closed. `boundary` is a path for messages and for absolute links only."""

    def __init__(self, boundary: Path, way: Sequence[_Step]) -> None:
        self.boundary = boundary
        self._way = tuple(way)  # from the boundary down to this folder
        self._is_open = True

    @classmethod
    def at(cls, path: Path) -> "OpenFolder":
        """The folder at a path that is trusted: links in it are followed. It is its own boundary. Raises OSError."""
        real = path.resolve()
        return cls(real, [_Step("", os.open(real, _AS_FOLDER))])

    def descend(self, path: str) -> "OpenFolder":
        """The folder at `path` below this one, under the same boundary. Raises OSError, LeadsOutside."""
        with ExitStack() as stack, _walked(self._way, path, self.boundary) as way:
            held = []
            for step in way:
                held.append(_Step(step.name, os.dup(step.descriptor)))
                stack.callback(os.close, held[-1].descriptor)
            stack.pop_all()
            return OpenFolder(self.boundary, held)

    @contextmanager
    def opened_file(self, name: str, *, within: Sequence[Parts]) -> Iterator[int]:
        """A descriptor of the regular file `name`, which links may lead to if it lies in one of the folders `within`.

        Raises OSError, LeadsOutside, NotAFile.
        """
        way: Sequence[_Step] = self._way
        with ExitStack() as stack:
            for _ in range(MAX_LINKS):
                folder, last = os.path.split(name)
                way = stack.enter_context(_walked(way, folder, self.boundary))
                parts = tuple(step.name for step in way[1:])
                if not any(parts[: len(allowed)] == allowed for allowed in within):
                    raise LeadsOutside()
                if last in ("", ".", ".."):
                    raise NotAFile()
                target = _link_target(last, way[-1].descriptor)
                if target is None:
                    yield _open_regular(last, way[-1].descriptor, stack)
                    return
                name = target
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))

    @contextmanager
    def entries(self) -> Iterator[Iterator[os.DirEntry[str]]]:
        """What lies in it. Raises OSError."""
        listing = os.open(".", os.O_RDONLY | os.O_DIRECTORY | _NOFOLLOW, dir_fd=self._way[-1].descriptor)
        try:
            with os.scandir(listing) as entries:
                yield entries
        finally:
            os.close(listing)

    def status(self, name: str, *, levels_up: int = 0) -> os.stat_result | None:
        """Of a name in this folder or in one above it; links are not followed. None: not there."""
        try:
            return os.stat(name, dir_fd=self._way[-1 - levels_up].descriptor, follow_symlinks=False)
        except (OSError, ValueError):
            return None

    @property
    def parts(self) -> Parts:
        return tuple(step.name for step in self._way[1:])

    @property
    def path(self) -> Path:
        return self.boundary.joinpath(*self.parts)

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            for step in self._way:
                os.close(step.descriptor)

    def __enter__(self) -> "OpenFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def _walked(start: Sequence[_Step], path: str, boundary: Path) -> Iterator[list[_Step]]:
    """The steps to the folder at `path`, from `start` on; those that are new are open within the context only."""
    pending = _names(path, boundary)
    way = list(start[:1] if path.startswith("/") else start)
    links = 0
    with ExitStack() as stack:
        for _ in range(MAX_STEPS):
            if not pending:
                yield way
                return
            name = pending.pop()
            if name == "..":
                if len(way) == 1:
                    raise LeadsOutside()
                way.pop()
                continue
            target = _link_target(name, way[-1].descriptor)
            if target is None:
                descriptor = os.open(name, _AS_FOLDER, dir_fd=way[-1].descriptor)
                stack.callback(os.close, descriptor)
                way.append(_Step(name, descriptor))
                continue
            links += 1
            if links > MAX_LINKS:
                break
            pending += _names(target, boundary)
            way = way[:1] if target.startswith("/") else way
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def _names(path: str, boundary: Path) -> list[str]:
    """Innermost first, so that the next one is the last. An absolute path counts from the boundary, if it is inside."""
    names = [name for name in path.split("/") if name not in ("", ".")]
    if path.startswith("/"):
        inside = boundary.parts[1:]
        if tuple(names[: len(inside)]) != inside:
            raise LeadsOutside()
        names = names[len(inside) :]
    return names[::-1]


def _link_target(name: str, folder: int) -> str | None:
    """Where the link `name` leads, None when it is no link. Raises OSError when there is nothing."""
    try:
        return os.readlink(name, dir_fd=folder)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return None
        raise


def _open_regular(name: str, folder: int, stack: ExitStack) -> int:
    """Asks what it is before it is opened, because opening a device acts, and again after."""
    if not stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
        raise NotAFile()
    descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | _NOFOLLOW, dir_fd=folder)  # a FIFO must not wait
    stack.callback(os.close, descriptor)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise NotAFile()
    return descriptor
