"""Who holds which block of the paged KV cache. Plain integers: no tensors, no scheduling policy, no text.

A block is held (reference count above zero: it stands in that many block tables), cached (nobody holds it, but its
content can still be found) or free. Only full blocks whose tokens are all computed are ever findable, so a block that
is still written to has exactly one holder.
"""

from collections import Counter, OrderedDict
from dataclasses import dataclass, field

from server.engine.prefix_cache import BlockContent, Digest, PrefixCache, blake2b_256
from server.engine.request import Request


@dataclass(slots=True)
class _Holding:
    """What the manager remembers of one request from its first block until `forget`, preemptions included."""

    request: Request
    root: BlockContent | None = None  # None until the first digest is asked for
    contents: list[BlockContent] = field(default_factory=list)  # of its first full blocks, each digested once
    num_committed: int = 0  # blocks [0, num_committed) of the table are offered to the prefix cache


class BlockManager:
    """Hands out blocks [0, num_blocks) of `block_size` tokens each, and finds computed prefixes again.

    All work is in proportion to the blocks a call adds, finds or releases, not to the tokens a request has.
    """

    def __init__(
        self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True, *, digest: Digest = blake2b_256
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._cache = PrefixCache(digest)
        self._ref_counts = [0] * num_blocks  # block → number of tables it stands in
        self._free = list(range(num_blocks - 1, -1, -1))  # no content; the last is taken first
        self._cached: OrderedDict[int, None] = OrderedDict()  # not held but findable; the first is evicted first
        self._holdings: dict[str, _Holding] = {}

    @property
    def num_free(self) -> int:
        """Blocks nobody holds; taking one may forget a cached prefix."""
        return len(self._free) + len(self._cached)

    @property
    def usage(self) -> float:
        """Share of blocks held by requests, 0 to 1."""
        return 1.0 - self.num_free / self.num_blocks

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def num_free_slots(self, request: Request) -> int:
        """How many more tokens `request` could compute if it took every free block."""
        return (len(request.block_table) + self.num_free) * self.block_size - request.num_computed_tokens

    def allocate_slots(self, request: Request, num_new_tokens: int) -> bool:
        """Grow the block table to cover tokens [0, num_computed_tokens + num_new_tokens).

        False, and nothing changes, when there are too few free blocks.
        """
        num_slots = request.num_computed_tokens + num_new_tokens
        num_missing = self.num_blocks_for(num_slots) - len(request.block_table)
        if num_missing <= 0:
            return True
        if num_missing > self.num_free:
            return False
        self._holding(request)
        request.block_table.extend([self._take() for _ in range(num_missing)])
        return True

    def may_match(self, request: Request) -> bool:
        """Whether the prefix cache may serve this request; with `prompt_logprobs` all its logits are needed."""
        return self.enable_prefix_caching and request.sampling_params.prompt_logprobs is None

    def match_prefix(self, request: Request) -> int:
        """Attach the longest chain of computed blocks to a request that holds none; returns the tokens they cover.

        At least one token is left to compute, since its logits are needed.
        """
        assert not request.block_table, f"{request.request_id} already holds blocks"
        if not self.may_match(request):
            return 0
        holding = self._holding(request)
        for index in range((request.num_tokens - 1) // self.block_size):
            found = self._cache.find(self._content(holding, index), self._parent(holding, index))
            if found is None:
                break
            block, holding.contents[index] = found
            self._attach(request, block)
        holding.num_committed = len(request.block_table)
        return len(request.block_table) * self.block_size

    def commit(self, request: Request) -> None:
        """After a step: make the blocks that became full and computed findable.

        A block whose content another block already stands for stays with its holder alone.
        """
        num_full = request.num_computed_tokens // self.block_size
        holding = self._holdings[request.request_id]
        if num_full <= holding.num_committed or not self.enable_prefix_caching:
            return
        for index in range(holding.num_committed, num_full):
            self._cache.insert(request.block_table[index], self._content(holding, index))
        holding.num_committed = num_full

    def free(self, request: Request) -> None:
        """Give back every block; computed ones stay findable until needed, the end of a chain going first."""
        for block in reversed(request.block_table):
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                self._release(block)
        request.block_table.clear()
        holding = self._holdings.get(request.request_id)
        if holding is not None:
            holding.num_committed = 0

    def forget(self, request: Request, *, keep_cached: bool = True) -> None:
        """The request has ended: give back its blocks and drop what was remembered of it.

        With `keep_cached` False nobody finds its blocks again: after a failed step their content is not trusted.
        """
        if not keep_cached:
            for block in request.block_table:
                self._cache.remove(block)
        self.free(request)
        self._holdings.pop(request.request_id, None)

    def check_integrity(self) -> None:
        """Raise AssertionError unless every block is in exactly one state and every count is right."""
        tables = [holding.request.block_table for holding in self._holdings.values()]
        counts = Counter(block for table in tables for block in table)
        free, cached, held = set(self._free), set(self._cached), set(counts)
        assert len(free) == len(self._free), "a block is free twice"
        assert len(free) + len(cached) + len(held) == self.num_blocks, "a block is lost or in two states"
        assert free | cached | held == set(range(self.num_blocks)), "an unknown block id"
        assert self._ref_counts == [counts[block] for block in range(self.num_blocks)], "a reference count is off"
        assert all(block in self._cache for block in cached), "a cached block cannot be found"
        assert not any(block in self._cache for block in free), "a free block can be found"
        self._cache.check_integrity()
        for holding in self._holdings.values():
            self._check_holding(holding)

    def _check_holding(self, holding: _Holding) -> None:
        request = holding.request
        assert len(set(request.block_table)) == len(request.block_table), f"{request.request_id} holds a block twice"
        assert len(request.block_table) * self.block_size >= request.num_computed_tokens
        for block in request.block_table[request.num_computed_tokens // self.block_size :]:
            assert self._ref_counts[block] == 1, f"block {block} is written to by {request.request_id} and shared"
            assert block not in self._cache, f"block {block} is written to by {request.request_id} and findable"

    @property
    def holders(self) -> frozenset[str]:
        """Ids of the requests that are remembered, whether they hold blocks now or not."""
        return frozenset(self._holdings)

    def _holding(self, request: Request) -> _Holding:
        holding = self._holdings.get(request.request_id)
        if holding is None:
            holding = self._holdings[request.request_id] = _Holding(request)
        return holding

    def _parent(self, holding: _Holding, index: int) -> BlockContent:
        """What stands before block `index` in the chain."""
        if index > 0:
            return holding.contents[index - 1]
        if holding.root is None:
            holding.root = self._cache.root(tuple(use for use in holding.request.adapters if use.active_from == 0))
        return holding.root

    def _content(self, holding: _Holding, index: int) -> BlockContent:
        """The content of full block `index`; called in order, so at most one digest is made."""
        if index == len(holding.contents):
            begin, end = index * self.block_size, (index + 1) * self.block_size
            token_ids = holding.request.token_ids(begin, end)
            beginning = tuple(use for use in holding.request.adapters if max(begin, 1) <= use.active_from < end)
            holding.contents.append(self._cache.child(self._parent(holding, index), token_ids, beginning))
        return holding.contents[index]

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._cache.remove(block)
        self._ref_counts[block] = 1
        return block

    def _attach(self, request: Request, block: int) -> None:
        if self._ref_counts[block] == 0:
            del self._cached[block]
        self._ref_counts[block] += 1
        request.block_table.append(block)

    def _release(self, block: int) -> None:
        if block in self._cache:
            self._cached[block] = None
        else:
            self._free.append(block)
