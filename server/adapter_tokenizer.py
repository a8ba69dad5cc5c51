"""Tokenizers and chat templates that adapters bring themselves, made of bytes alone.

Neither a class named in a file nor any code of one is run: `tokenizer.json` is read by the Rust library, of
`tokenizer_config.json` only the special tokens and the template are taken, and templates are rendered in transformers'
sandbox as the base's is. What an adapter does not bring is the base's. Knows nothing of requests or weights.
"""

import asyncio
import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from adapters.adapter_ref import AdapterVersion
from adapters.errors import AdapterRefused, RefusalCode
from adapters.own_tokenizer import CONFIG_NAME, TEMPLATE_NAME, decoded
from adapters.run_apart import LARGE
from adapters.tokenizer_digest import TOKENIZER_NAME
from adapters.untrusted_json import parse_object, shown
from server.tokenizer import Tokenizer, TokenizerNotLoaded
from server.tokenizer_check import why_unreadable

MAX_KEPT = 16  # a large one takes some 50 MB and a second to make, during which the Rust library holds Python's lock
_ONE_TOKEN = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).to_str().encode()

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class AdapterTokenizerNotLoaded(TokenizerNotLoaded):
    """The one that an adapter brings: the server is well, and the base answers."""

    status = 400
    error_type = "invalid_request_error"


class AdapterTokenizers:
    """The tokenizers of the versions that were asked for last; lives on the event loop."""

    def __init__(self, base: Tokenizer, *, max_kept: int = MAX_KEPT) -> None:
        self._base = base
        self._max_kept = max_kept
        self._made: OrderedDict[AdapterVersion, asyncio.Task[Tokenizer]] = OrderedDict()

    async def get(self, version: AdapterVersion, files: Mapping[str, bytes]) -> Tokenizer:
        """The version's, made once in a thread however many ask. Raises AdapterTokenizerNotLoaded."""
        task = self._made.get(version)
        if task is None:
            task = self._made[version] = asyncio.create_task(asyncio.to_thread(tokenizer_of, files, self._base))
            task.add_done_callback(lambda done: self._forget_failed(version, done))
        self._made.move_to_end(version)
        while len(self._made) > self._max_kept:
            self._made.popitem(last=False)
        return await asyncio.shield(task)  # whoever leaves takes it from nobody else

    def _forget_failed(self, version: AdapterVersion, done: "asyncio.Task[Tokenizer]") -> None:
        failed = done.cancelled() or done.exception() is not None
        if failed and self._made.get(version) is done:
            del self._made[version]

    def __contains__(self, version: object) -> bool:
        return version in self._made

    def __len__(self) -> int:
        return len(self._made)


def tokenizer_of(files: Mapping[str, bytes], base: Tokenizer) -> Tokenizer:
    """The tokenizer in `files`, or the base's with the template in `files`; the base's itself where nothing differs.
    Raises AdapterTokenizerNotLoaded."""
    try:
        return _made_of(files, base)
    except Exception as error:  # what the Rust library raises has no class of its own
        raise AdapterTokenizerNotLoaded(
            f"the tokenizer that the adapter brings cannot be read: {shown(str(error))}"
        ) from error


def _made_of(files: Mapping[str, bytes], base: Tokenizer) -> Tokenizer:
    config = _config(files)
    template = _template(files, config) or base.chat_template
    if TOKENIZER_NAME not in files:
        return base.with_chat_template(template)
    made = _fast_of(files[TOKENIZER_NAME], config, template)
    return base if _is_same(made, base) else made


def check_files(files: Mapping[str, bytes]) -> None:
    """Makes what requests will need, so that a load tells what is broken. Raises AdapterRefused (adapter_corrupt)."""
    config = _config(files)
    template = _template(files, config)
    at = TEMPLATE_NAME if TEMPLATE_NAME in files else CONFIG_NAME
    try:
        if template is not None:
            render_jinja_template([], chat_template=template)  # compiled, for no conversation
        at = TOKENIZER_NAME
        if TOKENIZER_NAME in files:
            _fast_of(_tried(files[TOKENIZER_NAME]), config, template)
    except AdapterRefused:
        raise
    except Exception as error:  # what the Rust library raises has no class of its own
        why = f"{'no tokenizer' if at == TOKENIZER_NAME else 'no chat template'} can be made of {at}"
        fix = f"Save {at} again, or remove it to use the base's"
        raise AdapterRefused(RefusalCode.CORRUPT, f"{why}: {shown(str(error))}", fix, feature=at) from error


def _tried(tokenizer_json: bytes) -> bytes:
    """Itself, or if it is large one to try out what stands beside it, after it was tried in a process of its own: a
    few bytes are enough to end that."""
    if (why := why_unreadable(tokenizer_json)) is not None:
        raise ValueError(why)
    return tokenizer_json if len(tokenizer_json) <= LARGE else _ONE_TOKEN


def _config(files: Mapping[str, bytes]) -> Mapping[str, Any]:
    return parse_object(files[CONFIG_NAME], what=CONFIG_NAME) if CONFIG_NAME in files else {}


def _fast_of(tokenizer_json: bytes, config: Mapping[str, Any], template: str | None) -> Tokenizer:
    options = {"clean_up_tokenization_spaces": False, **_special_tokens(config)}
    try:
        hf = _of_a_file(tokenizer_json, options)
    except OSError:  # no room for a file: not the adapter's fault
        hf = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_buffer(tokenizer_json), **options)
    hf.chat_template = template
    return Tokenizer(hf)


def _of_a_file(tokenizer_json: bytes, options: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Since transformers copies a tokenizer that is given as an object: as long again."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        file.write(tokenizer_json)
        file.flush()
        return PreTrainedTokenizerFast(tokenizer_file=file.name, **options)


def _is_same(made: Tokenizer, base: Tokenizer) -> bool:
    """Both do the same; a slow one is like no other."""
    if made.fast is None or base.fast is None or made.chat_template != base.chat_template:
        return False
    has_same_tokens = made.special_tokens == base.special_tokens and made.special_ids == base.special_ids
    if not has_same_tokens or (made.vocab_size, made.max_id) != (base.vocab_size, base.max_id):
        return False
    pieces = (made.fast.id_to_token(i) == base.fast.id_to_token(i) for i in range(made.max_id + 1))
    return all(pieces) and made.fast.to_str() == base.fast.to_str()  # last, since it holds Python's lock


def _template(files: Mapping[str, bytes], config: Mapping[str, Any]) -> str | None:
    """As transformers chooses: the file, else the config's one, or that named default of several."""
    if TEMPLATE_NAME in files:
        return decoded(files, TEMPLATE_NAME)
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    found = {name: _content(config.get(name)) for name in _SPECIAL_TOKENS}
    return {name: token for name, token in found.items() if token is not None}


def _content(token: Any) -> str | None:
    """A token is written as text, or as an object that holds it."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None
