"""The tokenizer and the chat template that an adapter brings, kept only where they mean something else than the base's.

Trainers put the base's tokenizer beside every adapter, often spelled anew by another release: thousands of copies of
megabytes would say nothing. So what files mean is compared, not their bytes. Knows no class of tokenizers, runs none:
who makes this says how files that are kept are checked.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from adapters.adapter_folder import AdapterFolder
from adapters.errors import AdapterRefused, RefusalCode
from adapters.tokenizer_digest import TOKENIZER_NAME, tokenizer_digest
from adapters.untrusted_json import parse_object

CONFIG_NAME, TEMPLATE_NAME = "tokenizer_config.json", "chat_template.jinja"
NAMES = (TOKENIZER_NAME, CONFIG_NAME, TEMPLATE_NAME)
_SLOW_NAMES = ("tokenizer.model", "vocab.json", "added_tokens.json")  # of tokenizers that only their own code reads
MAX_BYTES = 40 << 20
"""Of one file; the largest vocabularies take some 30 MB."""

Check = Callable[[Mapping[str, bytes]], object]
"""Raises AdapterRefused (adapter_corrupt) where no tokenizer or template can be made of the files."""

_ENDS = ("bos_token", "eos_token")
_NUM_KEPT = 32  # digests of what files mean, and of files that passed the check


@dataclass(frozen=True, slots=True)
class _Meaning:
    """None: the files do not say."""

    tokens: str | None  # digest of all that tokenizer.json does
    ends: tuple[str | None, ...]  # as in _ENDS
    template: str | None


class OwnTokenizers:
    """Against the tokenizer in the folder of a base, which may be missing. Used by several threads."""

    def __init__(self, base: Path, *, check: Check | None = None) -> None:
        self._check = check
        self._digests = _Recent()  # digest of a tokenizer.json → digest of what it means
        self._checked = _Recent()  # digest of files that passed → ""
        files = {name: (base / name).read_bytes() for name in NAMES if (base / name).is_file()}
        try:
            self._base = self._meaning(files)
        except AdapterRefused:  # stricter than who reads the base's: then whatever an adapter brings is its own
            self._base = _Meaning(None, (None,) * len(_ENDS), None)
        if self._base.tokens is not None:  # most adapters bring the very file: it is never forgotten, nor parsed again
            self._digests.pin(_digest(files[TOKENIZER_NAME]), self._base.tokens)

    def files_of(self, folder: AdapterFolder) -> Mapping[str, bytes]:
        """Those of the folder's files that are needed beside the base's, empty when none. Raises AdapterRefused
        (adapter_corrupt, adapter_too_large)."""
        files = {name: _read(folder, name) for name in NAMES if name in folder.tokenizer_files}
        kept = self._needed(files, self._meaning(files))
        if kept and self._check is not None:
            key = _digest(b"".join(name.encode() + _digest(data).encode() for name, data in sorted(kept.items())))
            if self._checked.get(key) is None:
                self._check(kept)
                self._checked.put(key, "")
        return MappingProxyType(kept)

    def _needed(self, files: Mapping[str, bytes], found: _Meaning) -> dict[str, bytes]:
        if found.tokens not in (None, self._base.tokens) or self._ends_otherwise(found):
            return dict(files)
        if found.template in (None, self._base.template):
            return {}
        return {name: data for name, data in files.items() if name != TOKENIZER_NAME}

    def _ends_otherwise(self, found: _Meaning) -> bool:
        """What has no tokenizer of its own cannot mean another end."""
        pairs = zip(found.ends, self._base.ends, strict=True)
        return found.tokens is not None and any(own not in (None, base) for own, base in pairs)

    def _meaning(self, files: Mapping[str, bytes]) -> _Meaning:
        tokens = self._tokens(files[TOKENIZER_NAME]) if TOKENIZER_NAME in files else None
        config = parse_object(files[CONFIG_NAME], what=CONFIG_NAME) if CONFIG_NAME in files else {}
        template = decoded(files, TEMPLATE_NAME) if TEMPLATE_NAME in files else None
        return _Meaning(tokens, tuple(_text(config.get(name)) for name in _ENDS), template or _template_in(config))

    def _tokens(self, data: bytes) -> str:
        key = _digest(data)
        found = self._digests.get(key)
        if found is None:
            found = tokenizer_digest(data)
            self._digests.put(key, found)
        return found


class _Recent:
    """A few digests by digest, those asked for last; and one that stays."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pinned: tuple[str, str] | None = None
        self._found: OrderedDict[str, str] = OrderedDict()

    def pin(self, key: str, value: str) -> None:
        self._pinned = (key, value)

    def get(self, key: str) -> str | None:
        if self._pinned is not None and self._pinned[0] == key:
            return self._pinned[1]
        with self._lock:
            if key in self._found:
                self._found.move_to_end(key)
            return self._found.get(key)

    def put(self, key: str, value: str) -> None:
        with self._lock:
            self._found[key] = value
            while len(self._found) > _NUM_KEPT:
                self._found.popitem(last=False)


def unread_tokens(folder: AdapterFolder, vocab_size: int | None) -> tuple[str, ...]:
    """A warning where the adapter has tokens of its own in files that are not read."""
    found = [name for name in _SLOW_NAMES if name in folder.tokenizer_files]
    if vocab_size is None or not found or TOKENIZER_NAME in folder.tokenizer_files:
        return ()
    names = " and ".join(found)
    why = f"the vocabulary has {vocab_size} tokens, and {names} cannot be read: text becomes the base's tokens"
    return (f"save {TOKENIZER_NAME} beside the adapter: {why}",)


def decoded(files: Mapping[str, bytes], name: str) -> str:
    """Raises AdapterRefused (adapter_corrupt) for what is not UTF-8."""
    try:
        return files[name].decode()
    except UnicodeDecodeError as error:
        why, fix = f"{name} is not UTF-8 at byte {error.start}", "Save it as UTF-8, or remove it to use the base's"
        raise AdapterRefused(RefusalCode.CORRUPT, why, fix, feature=name) from None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read(folder: AdapterFolder, name: str) -> bytes:
    with folder.open(name) as file:
        if file.num_bytes > MAX_BYTES:
            why = f"{name} has {file.num_bytes} bytes, over the limit of {MAX_BYTES}"
            raise AdapterRefused(RefusalCode.TOO_LARGE, why, "Remove it to use the base's tokenizer", feature=name)
        return file.read(file.num_bytes)


def _text(token: object) -> str | None:
    """A token is written as text, or as an object that holds it."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _template_in(config: Mapping[str, object]) -> str | None:
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {str(each.get("name")): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None
