"""Small real tokenizers, built here so that no test needs a model's files, and an engine that only keeps adapters."""

import asyncio
from functools import cache

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from adapters.adapter_facts import AdapterFacts, facts_of
from adapters.adapter_ref import AdapterVersion
from adapters.device_room import DeviceNeed
from adapters.host_cache import HostCache
from adapters.lora_model import LoRAModel
from adapters.module_names import BaseModules, LinearShape
from server.engine.request import EngineStats
from server.errors import ServerError
from server.tokenizer import Tokenizer

TINY_BASE = BaseModules(
    "llama",
    {
        f"model.layers.{layer}.self_attn.{kind}": LinearShape(8, 8 if kind == "q_proj" else 4)
        for layer in range(2)
        for kind in ("q_proj", "v_proj")
    },
)

CORPUS = [
    "The quick brown fox jumps over the lazy dog. the the the stop stop stopping END ENDING",
    "Привет, мир! Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "日本語のテキストと中文文本。한국어 텍스트",
    "Family: 👩‍👩‍👧‍👦 flag 🏳️‍🌈 naïve café",
    "select * from table where x = 1; {'json': [1, 2, 3]}",
]
TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if shout is defined and shout %}!{% endif %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@cache
def byte_level_tokenizer() -> Tokenizer:
    """Byte-level BPE with special tokens 0 and 1, an added token that is text, and a chat template."""
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|start|>", "<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator(CORPUS, trainer)
    fast.add_tokens([AddedToken("<tool>", special=False)])
    hf = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|end|>", clean_up_tokenization_spaces=False)
    hf.chat_template = TEMPLATE
    return Tokenizer(hf)


@cache
def byte_fallback_tokenizer() -> Tokenizer:
    """In sentencepiece's manner: '▁' for spaces, <0xNN> for bytes, the text's first space stripped."""
    specials = ["<unk>", "<s>", "</s>"]
    trained = FastTokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    ascii_only = [line.encode("ascii", "ignore").decode() for line in CORPUS]
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=specials, show_progress=False)
    trained.train_from_iterator(ascii_only, trainer)
    vocab = trained.get_vocab()
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    fast = FastTokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(Regex(" "), "\u2581")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    hf = PreTrainedTokenizerFast(
        tokenizer_object=fast, unk_token="<unk>", bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )
    return Tokenizer(hf)


@cache
def slow_tokenizer() -> Tokenizer:
    """Written in Python: one id a byte."""
    return Tokenizer(ByT5Tokenizer(extra_ids=0))


class FakeAdapterEngine:
    """The adapter side of an engine: a real host cache behind an inbox that answers in order, a little later.

    `refuse` fails the next loads, `dead` everything. `events` is what the engine did, in order.
    """

    def __init__(self, max_bytes: int = 1 << 20) -> None:
        self.host = HostCache(max_bytes)
        self.stats = EngineStats()
        self.facts: dict[AdapterVersion, AdapterFacts] = {}
        self.events: list[tuple[str, str]] = []
        self.refuse: Exception | None = None
        self.dead: ServerError | None = None
        self._inbox = asyncio.Lock()  # hands itself on in the order of asking

    @property
    def is_healthy(self) -> bool:
        return self.dead is None

    async def load_adapter(self, model: LoRAModel) -> None:
        async with self._inbox:
            await asyncio.sleep(0)
            for error in (self.dead, self.refuse):
                if error is not None:
                    raise error
            self.host.put(model)
            self.facts[model.version] = facts_of(model, DeviceNeed(num_rows=model.lora_rank))
            self.events.append(("load", model.version))

    async def unload_adapter(self, version: AdapterVersion) -> None:
        self.facts.pop(version, None)
        async with self._inbox:
            await asyncio.sleep(0)
            if self.dead is not None:
                raise self.dead
            if self.host.drop(version):
                self.events.append(("unload", version))
