"""Load options as a part of a source: `hf://org/sql#ignore=visual.*&moe_lora_b_layout=rank_major`.

They say what is made of the files that stand there, so they are kept wherever the source is: in records, in loads under
way, in what a version is read from again. One spelling for one meaning. Knows nothing of what they do.
"""

import re
from urllib.parse import quote, unquote

from adapters.errors import AdapterOptionInvalid
from adapters.read_options import NO_OPTIONS, ReadOptions

MAX_OPTION_CHARS = 4096  # as they stand in a source
_IGNORE, _LAYOUT = "ignore", "moe_lora_b_layout"
_OPTION = rf"(?:{_IGNORE}|{_LAYOUT})=[^#&/\s]*"
_FRAGMENT = re.compile(rf"(?P<place>[^\n]*)#(?P<options>{_OPTION}(?:&{_OPTION})*)")
_PLAIN = "*?[]!,:@$+"  # of a pattern, as it is; the rest is percent-encoded


def split_options(source: str) -> tuple[str, ReadOptions]:
    """The source without its options. What is not of their form belongs to the source, as `#` in a folder's name does.

    Raises AdapterOptionInvalid.
    """
    found = _FRAGMENT.fullmatch(source)
    if found is None:
        return source, NO_OPTIONS
    if len(found["options"]) > MAX_OPTION_CHARS:
        raise _too_long()
    pairs = [option.partition("=") for option in found["options"].split("&")]
    layouts = [unquote(value) for name, _, value in pairs if name == _LAYOUT]
    if len(layouts) > 1:
        raise AdapterOptionInvalid(f"{_LAYOUT} stands twice in the source")
    ignore = tuple(_decoded(value) for name, _, value in pairs if name == _IGNORE)
    return found["place"], ReadOptions(ignore=ignore, moe_lora_b_layout=layouts[0] if layouts else None)


def with_options(source: str, options: ReadOptions = NO_OPTIONS) -> str:
    """`source` with `options`, or with those that it has, in their one spelling. Raises AdapterOptionInvalid, also when
    it has some and more are given."""
    place, own = split_options(source)
    if own and options:
        raise AdapterOptionInvalid("the source has load options already; give them in one of the two places")
    chosen = own or options
    texts = [f"{_IGNORE}={quote(pattern, safe=_PLAIN)}" for pattern in chosen.ignore]
    texts += [f"{_LAYOUT}={chosen.moe_lora_b_layout}"] if chosen.moe_lora_b_layout is not None else []
    if not texts:
        return place
    if sum(map(len, texts)) + len(texts) > MAX_OPTION_CHARS:
        raise _too_long()
    return f"{place}#{'&'.join(texts)}"


def _decoded(value: str) -> str:
    try:
        return unquote(value, errors="strict")
    except UnicodeDecodeError:
        raise AdapterOptionInvalid(f"a pattern of {_IGNORE} is not UTF-8") from None


def _too_long() -> AdapterOptionInvalid:
    return AdapterOptionInvalid(f"load options take at most {MAX_OPTION_CHARS} characters in all, percent-encoded")
