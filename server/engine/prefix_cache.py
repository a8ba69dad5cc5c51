"""Which full KV blocks hold which content, so that equal prefixes are computed once. Integers and bytes only.

The content of a block is its own tokens, everything before them, and the adapters (version and weight) they were
computed with. An adapter that begins to act within a chain belongs to the link where it begins: what stands before is
what it would be without it, and shared. The digest is only the way to find a candidate: a hit also compares the token
ids, the chain of parents and the adapters, so that colliding digests cannot serve one prompt the keys and values of
another. Knows nothing of requests, reference counts or eviction.
"""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from struct import pack

from adapters.adapter_ref import AdapterUse

Digest = Callable[[bytes], bytes]


def blake2b_256(data: bytes) -> bytes:
    return blake2b(data, digest_size=32).digest()


@dataclass(slots=True, eq=False)
class BlockContent:
    """One link of a chain. `adapters` are those that act from here on: on the first link, which has no parent and no
    tokens, those that act from the first token.

    `parent` may be exchanged for an equal one (so that comparing chains ends at a shared link); the rest stays.
    """

    digest: bytes
    parent: "BlockContent | None"
    tokens: bytes = b""  # token ids as int64
    adapters: tuple[AdapterUse, ...] = ()


def _packed(adapters: tuple[AdapterUse, ...]) -> bytes:
    versions = [use.version.encode() for use in adapters]
    return b"".join(
        pack("<Qdq", len(version), use.weight, use.active_from) + version
        for version, use in zip(versions, adapters, strict=True)
    )


def is_same_chain(left: BlockContent | None, right: BlockContent | None) -> bool:
    """Exact comparison, link by link, until both chains share a link or end."""
    while left is not right:
        if left is None or right is None or left.tokens != right.tokens or left.adapters != right.adapters:
            return False
        left, right = left.parent, right.parent
    return True


class PrefixCache:
    """Digest → block and block → content, changed together by `insert` and `remove`."""

    def __init__(self, digest: Digest = blake2b_256) -> None:
        self._digest = digest
        self._blocks: dict[bytes, int] = {}
        self._contents: dict[int, BlockContent] = {}

    def root(self, adapters: tuple[AdapterUse, ...]) -> BlockContent:
        """The start of every chain that is computed with `adapters` from its first token."""
        return BlockContent(self._digest(_packed(adapters)), None, adapters=adapters)

    def child(
        self, parent: BlockContent, token_ids: Sequence[int], beginning: tuple[AdapterUse, ...] = ()
    ) -> BlockContent:
        """digest(child) = H(digest(parent) ‖ token ids ‖ adapters that begin at one of these tokens)."""
        tokens = array("q", token_ids).tobytes()
        return BlockContent(self._digest(parent.digest + tokens + _packed(beginning)), parent, tokens, beginning)

    def find(self, content: BlockContent, parent: BlockContent) -> tuple[int, BlockContent] | None:
        """The block that holds exactly `content` after `parent`, with the content object kept for it."""
        block = self._blocks.get(content.digest)
        if block is None:
            return None
        found = self._contents[block]
        if found.tokens != content.tokens or found.adapters != content.adapters:
            return None
        if not is_same_chain(found.parent, parent):
            return None
        found.parent = parent
        return block, found

    def insert(self, block: int, content: BlockContent) -> bool:
        """Make `block` findable; False, and nothing changes, when another block already stands for the digest."""
        if content.digest in self._blocks:
            return False
        self._blocks[content.digest] = block
        self._contents[block] = content
        return True

    def remove(self, block: int) -> None:
        content = self._contents.pop(block, None)
        if content is not None:
            del self._blocks[content.digest]

    def __contains__(self, block: int) -> bool:
        return block in self._contents

    def __len__(self) -> int:
        return len(self._contents)

    def check_integrity(self) -> None:
        assert {b: c.digest for b, c in self._contents.items()} == {b: d for d, b in self._blocks.items()}
