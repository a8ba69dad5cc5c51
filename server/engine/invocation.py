"""Where in a prompt an activated LoRA (aLoRA) begins to act: integers only.

The rule is PEFT's: at the last occurrence of the adapter's invocation tokens in the prompt, from their first token on.
Generated tokens are never searched: whatever an adapter is to act on after the prompt is decided by the prompt.
"""

from collections.abc import Sequence


def begin_of(prompt_ids: Sequence[int], invocation_tokens: Sequence[int]) -> int | None:
    """The first token of the last occurrence; None when there is none: the adapter then never acts."""
    wanted = tuple(invocation_tokens)
    for begin in range(len(prompt_ids) - len(wanted), -1, -1):
        if prompt_ids[begin] == wanted[0] and tuple(prompt_ids[begin : begin + len(wanted)]) == wanted:
            return begin
    return None
