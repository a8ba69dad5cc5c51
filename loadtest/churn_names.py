"""What each name may stand for at which moment, by the clock of whoever changes it. Knows no HTTP and no tokens.

Between sending a change and its acknowledgement a name may stand for the old or the new; before and after, for one
version only. A reply is right only if its version is among those its name may have stood for while the request was on
its way. `None` in place of a version: no such name.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

_Meaning = TypeVar("_Meaning")

Version = str | None


@dataclass(slots=True)
class _History(Generic[_Meaning]):
    """Moments at which what a name may mean changed, in order; before the first it meant nothing."""

    changes: list[tuple[float, frozenset[_Meaning]]] = field(default_factory=list)

    def now(self) -> frozenset[_Meaning]:
        return self.changes[-1][1]

    def between(self, since: float, until: float) -> set[_Meaning]:
        """All it may have meant at some moment of [since, until]."""
        found: set[_Meaning] = set()
        for moment, meanings in reversed(self.changes):
            if moment <= until:
                found |= meanings
            if moment <= since:
                break
        return found


class NameBook:
    """Adapters' names and aliases. A change is begun before it is sent and ended when it is acknowledged."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._versions: dict[str, _History[Version]] = {}
        self._targets: dict[str, _History[str | None]] = {}
        self._aborts: dict[str, list[list[float]]] = defaultdict(list)  # name → [begun, ended] of deletes that abort
        self.busy: set[str] = set()

    def begin(self, name: str, version: Version, *, aborts: bool = False) -> None:
        """`name` is about to become `version`, None = to be deleted; `aborts` ends the requests that use it."""
        now = self._clock()
        history = self._versions.setdefault(name, _History([(0.0, frozenset([None]))]))
        history.changes.append((now, history.now() | {version}))
        self.busy.add(name)
        if aborts:
            self._aborts[name].append([now, float("inf")])

    def end(self, name: str, version: Version) -> None:
        """`name` is `version` now, whatever was begun."""
        now = self._clock()
        self._versions[name].changes.append((now, frozenset([version])))
        self.busy.discard(name)
        for abort in self._aborts[name]:
            abort[1] = min(abort[1], now)

    def begin_alias(self, alias: str, targets: Iterable[str]) -> None:
        history = self._targets.setdefault(alias, _History([(0.0, frozenset([None]))]))
        history.changes.append((self._clock(), history.now() | set(targets)))
        self.busy.add(alias)

    def end_alias(self, alias: str, targets: Iterable[str] | None) -> None:
        """`alias` leads to `targets` now; None: the change was refused and all it may have meant stays possible."""
        if targets is not None:
            self._targets[alias].changes.append((self._clock(), frozenset(targets)))
        self.busy.discard(alias)

    def version(self, name: str) -> Version:
        """What a name that is not being changed stands for."""
        (version,) = self._versions[name].now()
        return version

    @property
    def present(self) -> list[str]:
        """Adapters' names that stand for a version and are not being changed."""
        return [name for name in self._versions if name not in self.busy and self.version(name) is not None]

    @property
    def absent(self) -> list[str]:
        """Names that were deleted and are not being changed."""
        return [name for name in self._versions if name not in self.busy and self.version(name) is None]

    @property
    def aliases(self) -> list[str]:
        return [alias for alias, history in self._targets.items() if history.now() != {None}]

    @property
    def aliased(self) -> set[str]:
        """Names that an alias may lead to."""
        return {target for history in self._targets.values() for target in history.now() if target is not None}

    def may_be(self, model: str, since: float, until: float) -> set[Version]:
        """The versions that a request for `model`, resolved within [since, until], may have got."""
        found: set[Version] = set()
        for name in self._names(model, since, until):
            found |= {None} if name is None else self._versions[name].between(since, until)
        return found

    def may_be_aborted(self, model: str, since: float, until: float) -> bool:
        """Whether a delete that aborts ran within [since, until] on a name that `model` may have led to."""
        names = self._names(model, since, until)
        spans = [abort for name in names if name is not None for abort in self._aborts[name]]
        return any(begun <= until and since <= ended for begun, ended in spans)

    def _names(self, model: str, since: float, until: float) -> set[str | None]:
        history = self._targets.get(model)
        return {model} if history is None else history.between(since, until)
