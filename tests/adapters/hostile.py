"""Adapter folders for tests: a healthy one for any base, and one for each way a folder can be wrong or hostile.

Files are written byte by byte, not through the safetensors library, which would refuse to write most of them. Every
`HostileCase` says which code the loader must answer with and what its message must name, so the same table serves the
loader's tests and the HTTP tests.
"""

import json
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adapters.errors import RefusalCode as Code
from adapters.lora_config import CONFIG_NAME
from adapters.module_names import BaseModules

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass
class Draft:
    """A healthy adapter before it is written; a case changes it, or the files afterwards."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Array]

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_config(self.folder, self.config)
        write_safetensors(self.folder / WEIGHTS, self.tensors)

    @property
    def first_a(self) -> str:
        return next(name for name in sorted(self.tensors) if ".lora_A." in name)

    @property
    def first_b(self) -> str:
        return self.first_a.replace(".lora_A.", ".lora_B.")


def draft(folder: Path, base: BaseModules, *, r: int = 4, seed: int = 0, num_modules: int = 3) -> Draft:
    """Random A and B on the first modules of the base; alpha 8."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, Array] = {}
    for name, shape in sorted(base.linears.items())[:num_modules]:
        tensors[f"{PREFIX}{name}.lora_A.weight"] = rng.normal(size=(r, shape.in_features)).astype(np.float32)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = rng.normal(size=(shape.out_features, r)).astype(np.float32)
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 8, "base_model_name_or_path": "some/base", "bias": "none"}
    return Draft(folder, config, tensors)


def healthy(folder: Path, base: BaseModules, *, r: int = 4, seed: int = 0) -> Path:
    draft(folder, base, r=r, seed=seed).write()
    return folder


def write_config(folder: Path, config: Mapping[str, Any] | str) -> None:
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")


def header_of(tensors: Mapping[str, Array]) -> dict[str, Any]:
    header: dict[str, Any] = {}
    position = 0
    for name, array in tensors.items():
        dtype = {"float32": "F32", "float16": "F16", "float64": "F64", "int8": "I8"}[array.dtype.name]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [position, position + array.nbytes]}
        position += array.nbytes
    return header


def write_raw(path: Path, header: Mapping[str, Any] | bytes, data: bytes, *, length: int | None = None) -> None:
    """A safetensors file with exactly this header; `length` is the one declared, if it is to be a lie."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def write_safetensors(path: Path, tensors: Mapping[str, Array]) -> None:
    write_raw(path, header_of(tensors), b"".join(array.tobytes() for array in tensors.values()))


@dataclass(frozen=True)
class HostileCase:
    """`build` makes the folder; the loader must refuse it with `code` and a message in which `names` stands."""

    name: str
    build: Callable[[Draft], None]
    code: Code
    names: str


HOSTILE: list[HostileCase] = []


def hostile(code: Code, names: str) -> Callable[[Callable[[Draft], None]], Callable[[Draft], None]]:
    def register(build: Callable[[Draft], None]) -> Callable[[Draft], None]:
        HOSTILE.append(HostileCase(build.__name__, build, code, names))
        return build

    return register


def config_case(name: str, field: str, value: object, code: Code, names: str) -> None:
    def build(d: Draft) -> None:
        d.config[field] = value
        d.write()

    HOSTILE.append(HostileCase(f"config_{name}", build, code, names))


def header_case(name: str, change: Callable[[dict[str, Any], str], None], code: Code, names: str) -> None:
    """`change` edits the header of a healthy file, given the name of its first tensor."""

    def build(d: Draft) -> None:
        d.write()
        header = header_of(d.tensors)
        change(header, next(iter(header)))
        write_raw(d.folder / WEIGHTS, header, b"".join(array.tobytes() for array in d.tensors.values()))

    HOSTILE.append(HostileCase(f"header_{name}", build, code, names))


# Formats and files


@hostile(Code.PICKLE_REFUSED, "adapter_model.bin")
def pickle_only(d: Draft) -> None:
    d.folder.mkdir()
    write_config(d.folder, d.config)
    (d.folder / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")


@hostile(Code.UNSUPPORTED, "format=gguf")
def gguf(d: Draft) -> None:
    d.folder.mkdir()
    (d.folder / "adapter.gguf").write_bytes(b"GGUF")


@hostile(Code.UNSUPPORTED, "MLX-LM")
def full_weights_of_mlx(d: Draft) -> None:
    d.folder.mkdir()
    write_config(d.folder, {"fine_tune_type": "full", "lora_parameters": {"rank": 8, "scale": 20.0}})
    write_safetensors(d.folder / "adapters.safetensors", d.tensors)


@hostile(Code.CORRUPT, "leads out")
def symlink_out_of_the_folder(d: Draft) -> None:
    d.write()
    outside = d.folder.parent / f"{d.folder.name}-outside.safetensors"
    (d.folder / WEIGHTS).rename(outside)
    (d.folder / WEIGHTS).symlink_to(outside)


@hostile(Code.CORRUPT, "leads out")
def symlinked_config_out_of_the_folder(d: Draft) -> None:
    d.write()
    (d.folder / CONFIG_NAME).unlink()
    (d.folder / CONFIG_NAME).symlink_to("/etc/hostname")


@hostile(Code.CORRUPT, "not a regular file")
def fifo_as_weights(d: Draft) -> None:
    d.write()
    (d.folder / WEIGHTS).unlink()
    os.mkfifo(d.folder / WEIGHTS)


@hostile(Code.AMBIGUOUS_LAYOUT, "index.json")
def file_and_index(d: Draft) -> None:
    d.write()
    (d.folder / "adapter_model.safetensors.index.json").write_text("{}")


@hostile(Code.CORRUPT, "/etc/passwd")
def index_that_names_a_path(d: Draft) -> None:
    d.write()
    (d.folder / WEIGHTS).unlink()
    index = {"weight_map": {d.first_a: "../../etc/passwd"}}
    (d.folder / "adapter_model.safetensors.index.json").write_text(json.dumps(index))


@hostile(Code.CORRUPT, "lora_B.weight")
def index_that_misplaces_a_tensor(d: Draft) -> None:
    d.write()
    (d.folder / WEIGHTS).rename(d.folder / "adapter_model-00001-of-00001.safetensors")
    index = {name: "adapter_model-00001-of-00001.safetensors" for name in d.tensors if name != d.first_b}
    (d.folder / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


# The bytes of the weight file


@hostile(Code.CORRUPT, "shorter than a safetensors header")
def empty_file(d: Draft) -> None:
    d.write()
    (d.folder / WEIGHTS).write_bytes(b"")


@hostile(Code.CORRUPT, "truncated")
def truncated_file(d: Draft) -> None:
    d.write()
    whole = (d.folder / WEIGHTS).read_bytes()
    (d.folder / WEIGHTS).write_bytes(whole[:-7])


@hostile(Code.CORRUPT, "with a tail")
def file_with_a_tail(d: Draft) -> None:
    d.write()
    with (d.folder / WEIGHTS).open("ab") as file:
        file.write(b"\0" * 64)


@hostile(Code.CORRUPT, "declares a header of 18446744073709551615 bytes")
def header_longer_than_the_file(d: Draft) -> None:
    d.write()
    write_raw(d.folder / WEIGHTS, b"{}", b"", length=2**64 - 1)


@hostile(Code.TOO_LARGE, "over the limit of 4194304")
def giant_header(d: Draft) -> None:
    d.write()
    write_raw(d.folder / WEIGHTS, b"{" + b" " * (5 << 20) + b"}", b"")


@hostile(Code.TOO_LARGE, "over the limit of 16384")
def a_hundred_thousand_tensors(d: Draft) -> None:
    d.write()
    header = b",".join(b'"%x":[]' % i for i in range(100_000))
    write_raw(d.folder / WEIGHTS, b"{" + header + b"}", b"")


@hostile(Code.CORRUPT, "not strict JSON")
def header_that_is_not_json(d: Draft) -> None:
    d.write()
    write_raw(d.folder / WEIGHTS, b"{'a': 1}", b"")


@hostile(Code.CORRUPT, "nested deeper")
def header_of_brackets(d: Draft) -> None:
    d.write()
    write_raw(d.folder / WEIGHTS, b'{"a":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}", b"")


@hostile(Code.CORRUPT, "stands twice")
def duplicate_tensor(d: Draft) -> None:
    d.write()
    header = json.dumps(header_of(d.tensors))
    first = json.dumps(d.first_a) + ': {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}, '
    data = b"".join(array.tobytes() for array in d.tensors.values())
    write_raw(d.folder / WEIGHTS, ("{" + first + header[1:]).encode(), data)


def _set(**changes: object) -> Callable[[dict[str, Any], str], None]:
    return lambda header, first: header[first].update(changes)


def _rename(new: str) -> Callable[[dict[str, Any], str], None]:
    def change(header: dict[str, Any], first: str) -> None:
        header[new] = header.pop(first)

    return change


header_case("dims_of_2_to_the_62", _set(shape=[2**62, 2**62]), Code.CORRUPT, "does not take")
header_case("dim_past_int64", _set(shape=[2**70, 1]), Code.CORRUPT, "is not a list")
header_case("zero_dim_with_2_to_the_62", _set(shape=[0, 2**62], data_offsets=[0, 0]), Code.CORRUPT, "lora_")
header_case("negative_dims", _set(shape=[-4, -16]), Code.CORRUPT, "is not a list")
header_case("boolean_dims", _set(shape=[True, True]), Code.CORRUPT, "is not a list")
header_case("a_thousand_dims", _set(shape=[1] * 1000), Code.CORRUPT, "is not a list")
header_case("shape_as_text", _set(shape="4,16"), Code.CORRUPT, "is not a list")
header_case("unknown_dtype", _set(dtype="F31"), Code.CORRUPT, "F31")
header_case("offsets_backwards", _set(data_offsets=[64, 0]), Code.CORRUPT, "are not [begin, end]")
header_case("offsets_overlap", lambda h, f: h[list(h)[1]].update(data_offsets=h[f]["data_offsets"]), Code.CORRUPT, "")
header_case("extra_key", _set(sparse=True), Code.CORRUPT, "something else")
header_case("entry_is_a_number", lambda h, f: h.update({f: 3}), Code.CORRUPT, "something else")
header_case("escape_in_name", _rename("a\n\x1b[31mroot.lora_A.weight"), Code.CORRUPT, "a\\n\\x1b[31mroot")
header_case("slashless_traversal", _rename("..\\..\\lora_A.weight"), Code.CORRUPT, "letters, digits")
header_case("surrogate_in_name", _rename("\ud800.lora_A.weight"), Code.CORRUPT, "\\ud800")
header_case("name_of_a_megabyte", _rename("a" * 1_000_000), Code.CORRUPT, "aaaa")
header_case("metadata_is_a_list", lambda h, _: h.update({"__metadata__": [1]}), Code.CORRUPT, "__metadata__")


# Tensors that do not fit


def _reshaped(name: str, which: str, rows: int, columns: int) -> None:
    """First A or B with `rows` and `columns` more."""

    def build(d: Draft) -> None:
        key = d.first_a if which == "a" else d.first_b
        shape = d.tensors[key].shape
        d.tensors[key] = np.ones((shape[0] + rows, shape[1] + columns), np.float32)
        d.write()

    HOSTILE.append(HostileCase(name, build, Code.SHAPE_MISMATCH, f"lora_{which.upper()}.weight"))


for _sign, _word in ((1, "more"), (-1, "fewer")):
    _reshaped(f"a_one_input_{_word}", "a", 0, _sign)
    _reshaped(f"b_one_output_{_word}", "b", _sign, 0)
    _reshaped(f"b_one_rank_{_word}", "b", 0, _sign)


@hostile(Code.SHAPE_MISMATCH, "lora_B.weight")
def a_one_rank_more(d: Draft) -> None:
    # A [r+1, in] is what r is read from, so it is B that no longer fits.
    d.tensors[d.first_a] = np.ones((d.tensors[d.first_a].shape[0] + 1, d.tensors[d.first_a].shape[1]), np.float32)
    d.write()


@hostile(Code.WRONG_BASE, "some/base")
def made_for_a_wider_base(d: Draft) -> None:
    for name, array in d.tensors.items():
        wide = (array.shape[0], 2 * array.shape[1]) if ".lora_A." in name else (2 * array.shape[0], array.shape[1])
        d.tensors[name] = np.ones(wide, np.float32)
    d.write()


@hostile(Code.SHAPE_MISMATCH, "adapter_config.json says 8")
def config_with_another_rank(d: Draft) -> None:
    d.config["r"] = 8
    d.write()


@hostile(Code.TOO_LARGE, "max_lora_rank=")
def rank_over_the_limit(d: Draft) -> None:
    for name, array in d.tensors.items():
        wide = (4096, array.shape[1]) if ".lora_A." in name else (array.shape[0], 4096)
        d.tensors[name] = np.ones(wide, np.float32)
    d.config["r"] = 4096
    d.write()


@hostile(Code.NONFINITE, "lora_A.weight")
def one_nan(d: Draft) -> None:
    d.tensors[d.first_a][0, 0] = np.nan
    d.write()


@hostile(Code.NONFINITE, "lora_B.weight")
def one_infinity(d: Draft) -> None:
    d.tensors[d.first_b][-1, -1] = -np.inf
    d.write()


@hostile(Code.NONFINITE, "after scaling")
def infinite_after_scaling(d: Draft) -> None:
    d.tensors[d.first_b][:] = 3e38
    d.config["lora_alpha"] = 400
    d.write()


@hostile(Code.NONFINITE, "overflows float32")
def finite_factors_of_an_infinite_product(d: Draft) -> None:
    d.tensors[d.first_a][:] = 1e30
    d.tensors[d.first_b][:] = 1e30
    d.write()


@hostile(Code.INCOMPLETE_PAIR, "lora_A.weight")
def missing_b(d: Draft) -> None:
    del d.tensors[d.first_b]
    d.write()


@hostile(Code.INCOMPLETE_PAIR, "lora_B.weight")
def missing_a(d: Draft) -> None:
    del d.tensors[d.first_a]
    d.write()


@hostile(Code.UNSUPPORTED, "3 dimensions")
def three_dimensions(d: Draft) -> None:
    d.tensors[d.first_a] = d.tensors[d.first_a][None]
    d.write()


@hostile(Code.UNSUPPORTED, "stored as F64")
def doubles(d: Draft) -> None:
    d.tensors[d.first_a] = d.tensors[d.first_a].astype(np.float64)
    d.write()


@hostile(Code.CORRUPT, "ZeRO-3")
def empty_tensors_of_zero3(d: Draft) -> None:
    d.tensors[d.first_a] = np.zeros((0,), np.float32)
    d.write()


# Names that reach nothing


def _extra(name: str, key: str, code: Code, names: str, shape: tuple[int, ...] = (4, 4)) -> None:
    def build(d: Draft) -> None:
        d.tensors[PREFIX + key] = np.ones(shape, np.float32)
        d.write()

    HOSTILE.append(HostileCase(f"extra_{name}", build, code, names))


_extra("embedding", "model.embed_tokens.lora_embedding_A", Code.INCOMPLETE_PAIR, "lora_embedding_A")
_extra("magnitude", "model.layers.0.q.lora_magnitude_vector", Code.INCOMPLETE_PAIR, "use_dora", (4,))
_extra("lora_bias", "model.layers.0.q.lora_B.bias", Code.INCOMPLETE_PAIR, "lora_B.bias", (4,))
_extra("whole_of_nothing", "model.layers.0.mlp.weight", Code.KEY_UNMATCHED, "model.layers.0.mlp")
_extra("tokens", "model.embed_tokens.token_adapter.trainable_tokens_delta", Code.INCOMPLETE_PAIR, "trainable_token")
_extra("loralib", "model.layers.0.q.lora_A", Code.UNSUPPORTED, "format=loralib")
_extra("torchtune", "layers.0.attn.q_proj.lora_a.weight", Code.UNSUPPORTED, "torchtune")
_extra("kohya", "lora_unet_down_blocks_0.lora_down.weight", Code.UNSUPPORTED, "image model")
_extra("stray", "model.layers.0.something", Code.KEY_UNMATCHED, "something")
_extra("two_halves_in_one", "model.lora_A.lora_B.weight", Code.AMBIGUOUS_LAYOUT, "lora_A.lora_B")
_extra("second_adapter", "model.layers.0.q.lora_A.other.weight", Code.AMBIGUOUS_LAYOUT, "adapter names")


@hostile(Code.KEY_UNMATCHED, "1 of 3 targeted modules")
def one_module_renamed(d: Draft) -> None:
    a, b = d.first_a, d.first_b
    d.tensors[a.replace(".lora_A.", "x.lora_A.")] = d.tensors.pop(a)
    d.tensors[b.replace(".lora_B.", "x.lora_B.")] = d.tensors.pop(b)
    d.write()


@hostile(Code.SHAPE_MISMATCH, "lm_head")
def lora_on_the_head(d: Draft) -> None:
    d.tensors = {f"{PREFIX}lm_head.lora_A.weight": np.ones((4, 8), np.float32)}
    d.tensors[f"{PREFIX}lm_head.lora_B.weight"] = np.ones((8, 4), np.float32)
    d.write()


# Fields of the config

for _field, _value, _code in (
    ("use_dora", True, Code.INCOMPLETE_PAIR),
    ("lora_bias", True, Code.INCOMPLETE_PAIR),
    ("modules_to_save", ["lm_head"], Code.INCOMPLETE_PAIR),
    ("trainable_token_indices", [1, 2], Code.INCOMPLETE_PAIR),
    ("target_parameters", ["mlp.experts.gate_up_proj"], Code.AMBIGUOUS_LAYOUT),
    ("layer_replication", [[0, 2], [1, 3]], Code.UNSUPPORTED),
    ("use_bdlora", {"nblocks": 2}, Code.SHAPE_MISMATCH),
    ("arrow_config", {"top_k": 3}, Code.UNSUPPORTED),
    ("kasa_config", {"beta": 1e-4}, Code.UNSUPPORTED),
    ("megatron_config", {"tensor_model_parallel_size": 2}, Code.UNSUPPORTED),
):
    config_case(_field, _field, _value, _code, _field)
for _init in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "something_new", 1, ["pissa"]):
    config_case(f"init_{_init}", "init_lora_weights", _init, Code.UNSUPPORTED, "init_lora_weights=")
for _name, _type in {"hira": "HIRA", "none": None, "number": 1, "list": ["LORA"]}.items():
    config_case(f"peft_type_{_name}", "peft_type", _type, Code.UNSUPPORTED, "peft_type")
config_case("unknown_field", "use_quantum", True, Code.UNKNOWN_FIELD, "use_quantum=True")
config_case("unknown_name_with_escape", "\x1b[31m", 1, Code.UNKNOWN_FIELD, "\\x1b[31m")
for _name, _r in {
    "zero": 0,
    "negative": -4,
    "bool": True,
    "float": 4.0,
    "text": "4",
    "none": None,
    "2_200": 2**200,
}.items():
    config_case(f"r_{_name}", "r", _r, Code.CORRUPT, "r ")
for _name, _alpha in {"bool": True, "text": "8", "none": None, "huge_int": 10**400, "huge": 1e300}.items():
    config_case(f"alpha_{_name}", "lora_alpha", _alpha, Code.CORRUPT, "lora_alpha")
config_case("alpha_past_the_scale", "lora_alpha", 1e8, Code.UNSUPPORTED, "scale of")
config_case("rslora_as_text", "use_rslora", "false", Code.CORRUPT, "use_rslora")
config_case("rank_pattern_list", "rank_pattern", ["q_proj"], Code.CORRUPT, "rank_pattern")
config_case("rank_pattern_value", "rank_pattern", {"q_proj": "8"}, Code.CORRUPT, "rank_pattern[q_proj]")
config_case("regex_bomb", "rank_pattern", {"([a-z_.0-9]+)+!": 4}, Code.UNSUPPORTED, "rank_pattern")
config_case("regex_bomb_alpha", "alpha_pattern", {"(a|a)*b": 4}, Code.UNSUPPORTED, "alpha_pattern")


def _raw_config(name: str, text: str, code: Code, names: str) -> None:
    def build(d: Draft) -> None:
        d.write()
        write_config(d.folder, text)

    HOSTILE.append(HostileCase(f"config_{name}", build, code, names))


_raw_config("nan_alpha", '{"peft_type":"LORA","r":4,"lora_alpha":NaN}', Code.CORRUPT, "NaN")
_raw_config("infinite_alpha", '{"peft_type":"LORA","r":4,"lora_alpha":1e999}', Code.CORRUPT, "largest double")
_raw_config("duplicate_key", '{"peft_type":"LORA","r":4,"r":8,"lora_alpha":8}', Code.CORRUPT, "'r' stands twice")
_raw_config("not_json", "peft_type: LORA", Code.CORRUPT, "not strict JSON")
_raw_config("a_list", "[1]", Code.CORRUPT, "not an object")
_raw_config("deep", '{"x":' + "[" * 50 + "]" * 50 + "}", Code.CORRUPT, "nested deeper")
_raw_config("brackets", "[" * 900_000, Code.CORRUPT, "nested deeper")
_raw_config("digits", '{"r":' + "9" * 100_000 + "}", Code.CORRUPT, "not strict JSON")
_raw_config("two_megabytes", "{" + " " * (2 << 20) + "}", Code.TOO_LARGE, "1048576")
