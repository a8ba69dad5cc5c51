"""What training wraps around a model, taken off the front of all names of a file alike. Knows nothing else of names."""

from collections.abc import Iterable, Sequence

WRAPPERS = ("base_model.model.", "module.", "_orig_mod.", "_fsdp_wrapped_module.")


def common_wrapper(keys: Sequence[str]) -> str:
    """The chain of wrappers that every key begins with; a wrapper only some carry is left on, and will not match."""
    wrapper = ""
    while found := next((w for w in WRAPPERS if _all_start_with(keys, wrapper + w)), None):
        wrapper += found
    return wrapper


def _all_start_with(keys: Iterable[str], prefix: str) -> bool:
    return all(key.startswith(prefix) for key in keys)
