"""The tokenizer and the chat template that an adapter brings, kept only where they mean something else than the base's.

Trainers put the base's tokenizer beside every adapter, often spelled anew by another release: thousands of copies of
megabytes would say nothing. So what files mean is compared, not their bytes. Knows no class of tokenizers, runs none.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

from adapters.adapter_folder import AdapterFolder
from adapters.errors import AdapterRefused, RefusalCode
from adapters.untrusted_json import parse_object

TOKENIZER_NAME, CONFIG_NAME, TEMPLATE_NAME = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
NAMES = (TOKENIZER_NAME, CONFIG_NAME, TEMPLATE_NAME)
MAX_BYTES = 64 << 20
"""Of one file; the largest vocabularies take some 30 MB."""

_OF_BATCHES = ("truncation", "padding")  # parts of tokenizer.json that do not change what a text's tokens are
_ENDS = ("bos_token", "eos_token")
_NUM_KEPT = 32  # digests of what files mean, by what they hold


@dataclass(frozen=True, slots=True)
class _Meaning:
    """None: the files do not say."""

    tokens: str | None  # digest of all that tokenizer.json does
    ends: tuple[str | None, ...]  # as in _ENDS
    template: str | None


class OwnTokenizers:
    """Against the tokenizer in the folder of a base, which may be missing. Used by several threads."""

    def __init__(self, base: Path) -> None:
        self._digest_of = lru_cache(_NUM_KEPT)(_digest_of)
        files = {name: (base / name).read_bytes() for name in NAMES if (base / name).is_file()}
        try:
            self._base = self._meaning(files)
        except AdapterRefused:  # stricter than who reads the base's: then whatever an adapter brings is its own
            self._base = _Meaning(None, (None,) * len(_ENDS), None)

    def files_of(self, folder: AdapterFolder) -> Mapping[str, bytes]:
        """Those of the folder's files that are needed beside the base's, empty when none. Raises AdapterRefused
        (adapter_corrupt, adapter_too_large)."""
        files = {name: _read(folder, name) for name in NAMES if name in folder.tokenizer_files}
        found, base = self._meaning(files), self._base
        if found.tokens not in (None, base.tokens) or self._ends_otherwise(found):
            return MappingProxyType(files)
        if found.template in (None, base.template):
            return MappingProxyType({})
        return MappingProxyType({name: data for name, data in files.items() if name != TOKENIZER_NAME})

    def _ends_otherwise(self, found: _Meaning) -> bool:
        """What has no tokenizer of its own cannot mean another end."""
        pairs = zip(found.ends, self._base.ends, strict=True)
        return found.tokens is not None and any(own not in (None, base) for own, base in pairs)

    def _meaning(self, files: Mapping[str, bytes]) -> _Meaning:
        tokens = self._digest_of(files[TOKENIZER_NAME]) if TOKENIZER_NAME in files else None
        config = parse_object(files[CONFIG_NAME], what=CONFIG_NAME) if CONFIG_NAME in files else {}
        template = files[TEMPLATE_NAME].decode("utf-8", "replace") if TEMPLATE_NAME in files else None
        return _Meaning(tokens, tuple(_text(config.get(name)) for name in _ENDS), template or _template_in(config))


def _read(folder: AdapterFolder, name: str) -> bytes:
    with folder.open(name) as file:
        if file.num_bytes > MAX_BYTES:
            why = f"{name} has {file.num_bytes} bytes, over the limit of {MAX_BYTES}"
            raise AdapterRefused(RefusalCode.TOO_LARGE, why, "Remove it to use the base's tokenizer", feature=name)
        return file.read(file.num_bytes)


def _digest_of(data: bytes) -> str:
    """Of a tokenizer.json, whatever its spelling."""
    fields = {key: value for key, value in parse_object(data, what=TOKENIZER_NAME).items() if key not in _OF_BATCHES}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


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
