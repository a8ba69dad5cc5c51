"""The negative cells: which folder, what is wrong with it, and the code it is refused with."""

import json

from adapters.errors import RefusalCode as Code
from tests.conformance import mutations as m
from tests.conformance.making import CONFIG
from tests.conformance.mutations import Folder, Negative

PAIR = {"A": "q_proj.lora_A.weight", "B": "q_proj.lora_B.weight"}
LAST = {"last A": "layers.1.self_attn.v_proj.lora_A", "last B": "layers.1.self_attn.v_proj.lora_B"}


def _tensors(source: str, parts: dict[str, str]) -> list[Negative]:
    """What can go wrong with any tensor of two dimensions that has a partner."""
    found: list[Negative] = []
    for label, part in parts.items():
        half = "lora_A" if "lora_A" in part else "lora_B"

        def add(what: str, mutate: m.Mutate, code: Code, label: str = label) -> None:
            found.append(Negative(f"{source}: {label} {what}", source, mutate, code))

        add("dropped", m.dropped(part), Code.INCOMPLETE_PAIR)
        add("of another module", m.renamed(part, "_proj", "_prxj"), Code.INCOMPLETE_PAIR)
        add("of no half", m.renamed(part, half, "lora_C"), Code.INCOMPLETE_PAIR)
        add("one column wider", m.reshaped(part, 1, 1), Code.SHAPE_MISMATCH)
        add("one column narrower", m.reshaped(part, 1, -1), Code.SHAPE_MISMATCH)
        add("one row longer", m.reshaped(part, 0, 1), Code.SHAPE_MISMATCH)
        add("one row shorter", m.reshaped(part, 0, -1), Code.SHAPE_MISMATCH)
        add("NaN first", m.poisoned(part, float("nan")), Code.NONFINITE)
        add("infinite last", m.poisoned(part, float("inf"), last=True), Code.NONFINITE)
        add("in doubles", m.stored_as(part, "F64"), Code.UNSUPPORTED)
        add("in bytes", m.stored_as(part, "I8"), Code.UNSUPPORTED)
        add("flattened", m.with_shape(part, lambda s: [s[0] * s[1]]), Code.UNSUPPORTED)
        add("of three dimensions", m.with_shape(part, lambda s: [1, *s]), Code.UNSUPPORTED)
        add("emptied", m.with_shape(part, lambda s: [0, s[1]]), Code.CORRUPT)
    return found


def _stray(source: str) -> list[Negative]:
    """A tensor too many."""

    def extra(name: str, shape: tuple[int, ...] = (4, 4)) -> m.Mutate:
        def mutate(folder: Folder) -> str:
            begin = len(folder.data)
            size = 4 * shape[0] * shape[1]
            folder.data += bytes(size)
            folder.header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, begin + size]}
            return name.split(".")[-2]

        return mutate

    base = "base_model.model.model.layers.0.self_attn"
    strays = {
        "a second name inside": (f"{base}.q_proj.lora_A.other.weight", Code.AMBIGUOUS_LAYOUT),
        "half a pair more": (f"{base}.z_proj.lora_A.weight", Code.INCOMPLETE_PAIR),
        "a name of no kind": (f"{base}.q_proj.lora_Z.weight", Code.KEY_UNMATCHED),
    }
    return [Negative(f"{source}: {what}", source, extra(name), code) for what, (name, code) in strays.items()]


def _lies(source: str) -> list[Negative]:
    """A header that is not the file's."""
    a = "lora_A"

    def duplicate(folder: Folder) -> str:
        name = folder.find(a)
        text = json.dumps(folder.header)
        first = json.dumps({name: folder.header[name]})[1:-1]
        folder.raw_header = ("{" + first + ", " + text[1:]).encode()
        return name.split(".")[-2]

    def shifted(by: int) -> m.Mutate:
        def mutate(folder: Folder) -> str:
            name = folder.find(a)
            folder.header[name]["data_offsets"] = [place + by for place in folder.header[name]["data_offsets"]]
            return ""

        return mutate

    lies: dict[str, m.Mutate] = {
        "one row more than bytes": m.entry(a, shape=[5, 32]),
        "one column less than bytes": m.entry(a, shape=[4, 31]),
        "half the bytes a value": m.entry(a, dtype="F16"),
        "an unknown dtype": m.entry(a, dtype="F33"),
        "a dtype that is a number": m.entry(a, dtype=32),
        "a shape that is text": m.entry(a, shape="4x32"),
        "a negative size": m.entry(a, shape=[-4, -32]),
        "a size that is a fraction": m.entry(a, shape=[4.0, 32]),
        "offsets backwards": m.entry(a, data_offsets=[128, 0]),
        "three offsets": m.entry(a, data_offsets=[0, 1, 2]),
        "offsets past the end": m.entry(a, data_offsets=[1 << 40, (1 << 40) + 512]),
        "another key": m.entry(a, stride=[32, 1]),
        "no shape": m.header(lambda h, n: h[n].pop("shape")),
        "no dtype": m.header(lambda h, n: h[n].pop("dtype")),
        "an entry that is a list": m.header(lambda h, n: h.update({n: [1, 2]})),
        "an entry that is null": m.header(lambda h, n: h.update({n: None})),
        "bytes that overlap": shifted(-4),
        "bytes with a hole": shifted(4),
        "a key twice": duplicate,
        "metadata that is a list": m.header(lambda h, _: h.update({"__metadata__": []}), names=False),
    }
    files: dict[str, m.Mutate] = {
        "one byte short": m.bytes_of(lambda f: f.data.pop()),
        "one byte long": m.bytes_of(lambda f: f.data.append(0)),
        "no data": m.bytes_of(lambda f: f.data.clear()),
        "a header length of zero": m.bytes_of(lambda f: setattr(f, "length", 0)),
        "a header length one short": m.bytes_of(lambda f: setattr(f, "length", len(json.dumps(f.header)) - 1)),
        "a header length past the file": m.bytes_of(lambda f: setattr(f, "length", 1 << 60)),
        "a header that is no JSON": m.bytes_of(lambda f: setattr(f, "raw_header", b"{'a': 1}")),
        "a header that is a list": m.bytes_of(lambda f: setattr(f, "raw_header", b"[]")),
        "a header with NaN": m.bytes_of(lambda f: setattr(f, "raw_header", b'{"a": NaN}')),
    }
    return [Negative(f"{source}: {name}", source, make, Code.CORRUPT) for name, make in {**lies, **files}.items()]


def _config() -> list[Negative]:
    """One field of a good config changed."""
    corrupt: dict[str, m.Mutate] = {
        "r missing": m.without("r"), "r zero": m.config("r", 0), "r negative": m.config("r", -4),
        "r a float": m.config("r", 4.0), "r text": m.config("r", "4"), "r true": m.config("r", True),
        "alpha missing": m.without("lora_alpha"), "alpha text": m.config("lora_alpha", "8"),
        "alpha true": m.config("lora_alpha", True), "alpha past all": m.config("lora_alpha", 1e300),
        "rslora text": m.config("use_rslora", "yes"), "rslora a number": m.config("use_rslora", 1),
        "rank_pattern a list": m.config("rank_pattern", ["q_proj"]),
        "rank_pattern of text": m.config("rank_pattern", {"q_proj": "4"}),
        "alpha_pattern of null": m.config("alpha_pattern", {"q_proj": None}),
        "a key twice": m.raw_config(lambda text: text.replace('"r": 4', '"r": 4, "r": 4'), "'r'"),
        "NaN": m.raw_config(lambda text: text.replace('"lora_alpha": 8', '"lora_alpha": NaN'), CONFIG),
        "cut off": m.raw_config(lambda text: text[:-1], CONFIG),
        "a list": m.raw_config(lambda text: f"[{text}]", CONFIG),
        "empty": m.raw_config(lambda _: "", CONFIG),
    }  # fmt: skip
    shapes = {
        "r one more": m.config("r", 5, "5"), "r one less": m.config("r", 3, "3"),
        "rank_pattern of another rank": m.config("rank_pattern", {"q_proj": 5}, "q_proj"),
    }  # fmt: skip
    unsupported: dict[str, m.Mutate] = {
        "alpha past the scale": m.config("lora_alpha", 1e8),
        "layer_replication": m.config("layer_replication", [[0, 2]]),
        "arrow_config": m.config("arrow_config", {"top_k": 2}),
        "megatron_config": m.config("megatron_config", {"x": 1}),
        "a pattern with groups": m.config("rank_pattern", {"(a|b)+": 4}, "rank_pattern"),
        "an alpha pattern with groups": m.config("alpha_pattern", {"(q_proj)": 4}, "alpha_pattern"),
        **{f"init {init}": m.config("init_lora_weights", init) for init in (
            "pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "unheard_of", 3)},
        **{f"peft_type {kind}": m.config("peft_type", kind) for kind in (
            "XLORA", "POLY", "HIRA", "FOURIERFT", "RANDLORA", "C3A", "SHIRA", "WAVEFT", "OSF", "LOKR", "OFT", "BOFT",
            "HRA", "ROAD", "PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING",
            "ADAPTION_PROMPT", "CPT", "BONE", "UNHEARD_OF", None, 7)},
    }  # fmt: skip
    unknown = {"a field of no one": m.config("use_quantum", True), "a table of no one": m.config("quantum", {"a": 1})}
    groups = [(corrupt, Code.CORRUPT), (shapes, Code.SHAPE_MISMATCH), (unsupported, Code.UNSUPPORTED),
              (unknown, Code.UNKNOWN_FIELD)]  # fmt: skip
    found = [Negative(f"config: {name}", "plain", make, code) for cells, code in groups for name, make in cells.items()]
    return [*found, *_flipped()]


def _flipped() -> list[Negative]:
    """A feature that the config claims and the tensors lack, and features that exclude each other."""
    blocks = {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": [], "nblocks": 2}
    claims: dict[str, tuple[str, m.Mutate, Code, str]] = {
        "dora claimed": ("plain", m.config("use_dora", True, ""), Code.INCOMPLETE_PAIR, "dora"),
        "dora unsaid on queries": (
            "dora", m.without("use_dora", "lora_magnitude_vector"), Code.AMBIGUOUS_LAYOUT, "dora_unsaid"
        ),
        "dora and a bias of B": ("dora", m.config("lora_bias", True), Code.UNSUPPORTED, "lora_bias"),
        "blocks claimed": ("plain", m.config("use_bdlora", blocks, ""), Code.SHAPE_MISMATCH, "bdlora"),
        "an invocation without tokens": (
            "plain", m.config("alora_invocation_string", "<run>"), Code.UNSUPPORTED, "alora_once"
        ),
    }  # fmt: skip
    return [
        Negative(f"config: {what}", source, mutate, code, after=(after,))
        for what, (source, mutate, code, after) in claims.items()
    ]


def _parts() -> list[Negative]:
    """One tensor of what is not a plain pair."""
    parts = {
        "dora": ["lora_magnitude_vector"],
        "mts_norm": ["norm.weight"],
        "adalora": ["lora_A", "lora_B", "lora_E"],
        "vera": ["vera_lambda_d", "vera_lambda_b"],
        "loha": ["hada_w1_a", "hada_w2_b"],
        "delora": ["delora_A", "delora_B"],
        "miss": ["miss_block"],
        "ia3": ["ia3_l"],
        "tokens": ["trainable_tokens_delta"],
        "embed": ["lora_embedding_A", "lora_embedding_B"],
        "head": ["lm_head.lora_A", "lm_head.lora_B"],
        "ln_tuning": ["ln_tuning_layers.weight"],
    }
    found: list[Negative] = []
    for source, wanted in parts.items():
        for part in wanted:
            found += [
                Negative(f"{source}: {part} one longer", source, m.reshaped(part, 0, 1), Code.SHAPE_MISMATCH),
                Negative(f"{source}: {part} NaN", source, m.poisoned(part, float("nan")), Code.NONFINITE),
                Negative(f"{source}: {part} in doubles", source, m.stored_as(part, "F64"), Code.UNSUPPORTED),
            ]
    pairs = {"dora": ["lora_magnitude_vector"], "embed": parts["embed"], "head": parts["head"], "loha": parts["loha"],
             "adalora": parts["adalora"], "delora": parts["delora"], "vera": parts["vera"]}  # fmt: skip
    found += [
        Negative(f"{source}: {part} dropped", source, m.dropped(part), Code.INCOMPLETE_PAIR)
        for source, wanted in pairs.items()
        for part in wanted
    ]
    return found


NEGATIVES: tuple[Negative, ...] = (
    *_tensors("plain", PAIR),
    *_tensors("plain", LAST),
    *_tensors("rslora", {"A": "down_proj.lora_A.weight", "B": "down_proj.lora_B.weight"}),
    *_tensors("patterns", {"B": "up_proj.lora_B.weight"}),
    *_stray("plain"),
    *_lies("plain"),
    *_config(),
    *_parts(),
)
