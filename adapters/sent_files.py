"""Which files of an adapter's folder are sent to a server, by whoever sends them and by the server that takes them.

Exactly what a load looks at: config, weights in one file or as index and shards, a tokenizer and a chat template. No
torch here, since a client needs none. Knows nothing of how files travel.
"""

import re
from collections.abc import Collection

from adapters.adapter_folder import INDEX_NAMES, MLX_WEIGHTS_NAME, TOKENIZER_FILES, WEIGHTS_NAME, AdapterFolder
from adapters.lora_config import CONFIG_NAME
from adapters.own_tokenizer import NAMES as READ_TOKENIZER_FILES
from adapters.shard_index import MAX_SHARDS, shard_names
from adapters.tokenizer_digest import TOKENIZER_NAME

ACCEPTED = ", ".join(
    (CONFIG_NAME, WEIGHTS_NAME, MLX_WEIGHTS_NAME, *INDEX_NAMES, "shards (*.safetensors) that an index names")
    + TOKENIZER_FILES
)
"""For people."""

_BESIDE = frozenset((CONFIG_NAME, *TOKENIZER_FILES))
_HEADS = (WEIGHTS_NAME, *INDEX_NAMES, MLX_WEIGHTS_NAME)  # one of which says what the weights are
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")
MAX_FILES = len(_BESIDE) + len(_HEADS) + MAX_SHARDS


class FilesNotWhole(Exception):
    """The files do not make one adapter; the message names those that lack or are left over."""


def may_be_sent(name: str) -> bool:
    """By the name alone. A shard's has letters, digits and . _ -, so that none is a path or breaks a header."""
    return name in _BESIDE or name in INDEX_NAMES or is_weights(name)


def is_weights(name: str) -> bool:
    return _SHARD.fullmatch(name) is not None


def names_to_send(folder: AdapterFolder) -> list[str]:
    """In the order they are sent. A tokenizer that only its own code reads is told of, where there is no other.

    Raises AdapterRefused where the index cannot be read, FilesNotWhole for a shard whose name cannot be sent.
    """
    weights = _weights(folder)
    unfit = [name for name in weights if not may_be_sent(name)]
    if unfit:
        raise FilesNotWhole(f"{unfit[0]!r} cannot be sent: a shard's name has letters, digits and . _ - only")
    has_own = TOKENIZER_NAME in folder.tokenizer_files
    beside = [name for name in folder.tokenizer_files if name in READ_TOKENIZER_FILES or not has_own]
    return [CONFIG_NAME, *weights, *beside]


def check_whole(sent: Collection[str]) -> None:
    """A config and something that says what the weights are, before any is opened. Raises FilesNotWhole."""
    if CONFIG_NAME not in sent:
        raise FilesNotWhole(f"the upload lacks {CONFIG_NAME}")
    if not any(name in sent for name in _HEADS):
        raise FilesNotWhole(f"the upload lacks {WEIGHTS_NAME}, or in its place one of {', '.join(_HEADS[1:])}")


def check_weights(folder: AdapterFolder, sent: Collection[str]) -> None:
    """That the weights that were sent are those that a load reads. Raises AdapterRefused, FilesNotWhole."""
    wanted = _weights(folder)
    missing = [name for name in wanted if name not in sent]
    if missing:
        raise FilesNotWhole(f"the upload lacks {' and '.join(missing)}, which {folder.weights} names")
    unread = sorted(set(sent) - _BESIDE - set(wanted))
    if unread:
        raise FilesNotWhole(f"{' and '.join(unread)} would not be read: the weights are those of {folder.weights}")


def _weights(folder: AdapterFolder) -> list[str]:
    return [folder.weights, *(shard_names(folder) if folder.is_sharded else ())]
