"""The keys of rank_pattern and alpha_pattern, matched as PEFT matches them but in bounded time.

PEFT runs each key as a regular expression, `(.*\\.)?(key)$` from the start of the module name, and the first key that
matches wins. A file may therefore hold a pattern that takes hours. Here a key is a sequence of one-character atoms
(a letter, `.`, an escaped sign, `\\d`, `\\w`), each possibly repeated (`*`, `+`, `?`), with `^`, `$` and alternatives
`a|b` at the outside: on that language the answer is PEFT's, in O(len(key) · len(name)) steps. Groups, classes, counts
and lookarounds are refused by name. Knows nothing of ranks, scales or tensors.
"""

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Generic, TypeVar

from adapters.errors import AdapterRefused, RefusalCode
from adapters.untrusted_json import shown

MAX_PATTERNS = 4096
"""Keys in one pattern table; one per module of an 80-layer model is 560."""
MAX_LOOSE_PATTERNS = 64
"""Keys with repeats or alternatives: each costs some 30 µs a module, so their number is bounded separately."""
MAX_PATTERN_LENGTH = 256

_LITERALS = frozenset(string.ascii_letters + string.digits + "_-/:@")
_CLASSES = {"d": frozenset(string.digits), "w": frozenset(string.ascii_letters + string.digits + "_")}
_ESCAPABLE = frozenset("._-/:@")
_FIX = "Write the module's full name, or its last parts, instead of the expression"

V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class _Atom:
    """One character of the name: any of `chars` (None = every character), zero times, once or often."""

    chars: frozenset[str] | None
    is_optional: bool = False
    is_repeated: bool = False

    def accepts(self, char: str) -> bool:
        return self.chars is None or char in self.chars


@dataclass(frozen=True, slots=True)
class _Sequence:
    """One alternative of a key."""

    atoms: tuple[_Atom, ...]
    is_anchored: bool
    tail: str  # what every match ends with; decides most questions at once
    is_loose: bool  # an atom may repeat or be left out

    def matches(self, name: str) -> bool:
        if not name.endswith(self.tail):
            return False
        return self._matches_loosely(name) if self.is_loose else self._matches_literally(name)

    def _matches_literally(self, name: str) -> bool:
        start = len(name) - len(self.atoms)
        if start < 0 or (start > 0 and (self.is_anchored or name[start - 1] != ".")):
            return False
        return all(atom.accepts(char) for atom, char in zip(reversed(self.atoms), reversed(name), strict=False))

    def _matches_loosely(self, name: str) -> bool:
        """All positions of the key that some reading of name[:i] can have reached, moved along one character a time."""
        positions: set[int] = set()
        for i, char in enumerate(name):
            if self._may_start(name, i):
                positions |= self._reach(0)
            moved: set[int] = set()
            for p in positions:
                if p < len(self.atoms) and self.atoms[p].accepts(char):
                    moved |= self._reach(p) if self.atoms[p].is_repeated else set()
                    moved |= self._reach(p + 1)
            positions = moved
        if self._may_start(name, len(name)):
            positions |= self._reach(0)
        return len(self.atoms) in positions

    def _may_start(self, name: str, i: int) -> bool:
        return i == 0 or (name[i - 1] == "." and not self.is_anchored)

    def _reach(self, position: int) -> set[int]:
        """The position and those after it that can be had by leaving optional atoms out."""
        reached = {position}
        while position < len(self.atoms) and self.atoms[position].is_optional:
            position += 1
            reached.add(position)
        return reached


@dataclass(frozen=True, slots=True)
class NamePattern:
    """One parsed key."""

    source: str
    alternatives: tuple[_Sequence, ...]

    @classmethod
    def parse(cls, source: str, *, field: str) -> "NamePattern":
        """Raises AdapterRefused (adapter_unsupported) when the key is outside the language above."""
        if not 0 < len(source) <= MAX_PATTERN_LENGTH:
            raise _refused(field, source, f"the key has {len(source)} characters; 1 to {MAX_PATTERN_LENGTH} are read")
        return cls(source, tuple(_parse_sequence(part, field, source) for part in source.split("|")))

    @property
    def is_loose(self) -> bool:
        return len(self.alternatives) > 1 or any(sequence.is_loose for sequence in self.alternatives)

    def matches(self, name: str) -> bool:
        return any(sequence.matches(name) for sequence in self.alternatives)


@dataclass(frozen=True, slots=True)
class PatternTable(Generic[V]):
    """A rank_pattern or alpha_pattern: keys in file order, the first that matches decides."""

    entries: tuple[tuple[NamePattern, V], ...] = ()

    @classmethod
    def parse(cls, table: Mapping[str, V], *, field: str) -> "PatternTable[V]":
        if len(table) > MAX_PATTERNS:
            raise _refused(field, "", f"{len(table)} keys, over the limit of {MAX_PATTERNS}")
        entries = tuple((NamePattern.parse(key, field=field), value) for key, value in table.items())
        num_loose = sum(pattern.is_loose for pattern, _ in entries)
        if num_loose > MAX_LOOSE_PATTERNS:
            raise _refused(field, "", f"{num_loose} keys are expressions, over the limit of {MAX_LOOSE_PATTERNS}")
        return cls(entries)

    def lookup(self, module: str, default: V) -> V:
        return next((value for pattern, value in self.entries if pattern.matches(module)), default)

    def to_json(self, convert: Callable[[V], object]) -> list[list[object]]:
        """Pairs in order: the order decides, so it is part of the adapter's identity."""
        return [[pattern.source, convert(value)] for pattern, value in self.entries]


def _parse_sequence(text: str, field: str, source: str) -> _Sequence:
    is_anchored = text.startswith("^")
    body = text[is_anchored:].removesuffix("$") if not text.endswith("\\$") else text[is_anchored:]
    atoms: list[_Atom] = []
    i = 0
    while i < len(body):
        chars, i = _parse_atom(body, i, field, source)
        sign = body[i] if i < len(body) and body[i] in "*+?" else ""
        i += len(sign)
        atoms.append(_Atom(chars, is_optional=sign in ("*", "?"), is_repeated=sign in ("*", "+")))
    if not atoms:
        raise _refused(field, source, "an empty alternative matches no module")
    is_loose = any(atom.is_optional or atom.is_repeated for atom in atoms)
    return _Sequence(tuple(atoms), is_anchored, _fixed_tail(atoms), is_loose)


def _fixed_tail(atoms: Sequence[_Atom]) -> str:
    tail = ""
    for atom in reversed(atoms):
        if atom.chars is None or len(atom.chars) != 1 or atom.is_optional or atom.is_repeated:
            break
        tail = next(iter(atom.chars)) + tail
    return tail


@cache
def _only(char: str) -> frozenset[str]:
    """One set for each character: a table of patterns has a million of them."""
    return frozenset(char)


def _parse_atom(body: str, i: int, field: str, source: str) -> tuple[frozenset[str] | None, int]:
    char = body[i]
    if char == ".":
        return None, i + 1
    if char in _LITERALS:
        return _only(char), i + 1
    escaped = body[i + 1 : i + 2]
    if char == "\\" and escaped in _CLASSES:
        return _CLASSES[escaped], i + 2
    if char == "\\" and escaped in _ESCAPABLE:
        return _only(escaped), i + 2
    raise _refused(field, source, f"regular expressions from a file are not run, and {shown(char)!r} is not plain")


def _refused(field: str, key: str, why: str) -> AdapterRefused:
    feature = f"{field}[{shown(key)!r}]" if key else field
    return AdapterRefused(RefusalCode.UNSUPPORTED, why, _FIX, feature=feature)
