"""What token ids mean to one request: the tokenizer that makes and reads them, and how many there are.

The base's, unless an adapter of the request brings a tokenizer, a template or a vocabulary of another size; at most one
of them brings each, or it would have been refused as a conflict. Knows nothing of sampling.
"""

from dataclasses import dataclass

from server.api.adapter_hold import AdapterHold
from server.api.context import ServerContext
from server.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Vocabulary:
    tokenizer: Tokenizer
    size: int  # token ids [0, size) may be sent and sampled
    eos_token_ids: frozenset[int]
    is_base: bool = True


async def vocabulary_of(context: ServerContext, hold: AdapterHold) -> Vocabulary:
    """Of adapters that are in memory. Raises AdapterTokenizerNotLoaded."""
    info = context.engine.info
    num_rows, tokenizer, is_base = info.num_embeddings, context.tokenizer, True
    for held in hold.adapters:
        facts = context.engine.facts[held.version]
        if facts.vocab_size is not None:
            num_rows, is_base = facts.vocab_size, False
        if facts.has_tokenizer:
            tokenizer, is_base = await context.tokenizers.get(held.version, facts.tokenizer_files), False
    if is_base:
        return Vocabulary(tokenizer, info.vocab_size, info.eos_token_ids)
    size = min(num_rows, tokenizer.max_id + 1)
    return Vocabulary(tokenizer, size, info.eos_token_ids | tokenizer.eos_token_ids, is_base=False)
