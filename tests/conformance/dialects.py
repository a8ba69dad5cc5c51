"""One adapter in the spellings of other producers: each function takes PEFT's files and writes what another would."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.conformance.making import CONFIG, Adapter, Files, Rewrite, by_peft, lora, plain
from tests.conformance.oracle import PeftOracle
from tests.conformance.traits import Traits

PREFIX = "base_model.model."
GROUP = 8  # QALoRA: inputs that share a column of A


def _renamed(rename: Callable[[str], str]) -> Rewrite:
    def rewrite(files: Files, folder: Path) -> None:
        Files(files.config, {rename(name): tensor for name, tensor in files.tensors.items()}).write(folder)

    return rewrite


def _infixed(name: str) -> str:
    """A raw state dict holds the adapter's name."""
    return name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")


def _wrapped(name: str) -> str:
    module, half, tail = name.partition(".lora_")
    outer, _, last = module.rpartition(".")
    return f"{outer}._fsdp_wrapped_module.{last}{half}{tail}"


def _headless(name: str) -> str:
    """Saved from the model without its head, so without the first part of a module's name."""
    return PREFIX + name.removeprefix(PREFIX).partition(".")[2]


infixed, inner_wrappers, headless = _renamed(_infixed), _renamed(_wrapped), _renamed(_headless)
old_bias_keys = _renamed(lambda name: name.replace(".base_layer.bias", ".bias"))  # PEFT before 0.7


def spelled(prefix: str) -> Rewrite:
    """The text model of a vision-language class, as another release or class calls it."""
    return _renamed(lambda name: name.replace("model.language_model.", prefix, 1) if prefix else _bare(name))


def _bare(name: str) -> str:
    return name.replace("model.language_model.", "", 1)


def without_use_dora(files: Files, folder: Path) -> None:
    """torchtune's export: the magnitudes are there, the field that says so is not."""
    del files.config["use_dora"]
    files.write(folder)


def unsloth(files: Files, folder: Path) -> None:
    files.config["auto_mapping"] = {"base_model_class": "A", "parent_library": "unsloth", "unsloth_fixed": True}
    files.write(folder)


def _sharded(index_name: str) -> Rewrite:
    def rewrite(files: Files, folder: Path) -> None:
        (folder / CONFIG).write_text(json.dumps(files.config))
        places = {name: f"adapter_model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(files.tensors)}
        for file in sorted(set(places.values())):
            save_file({name: files.tensors[name] for name, place in places.items() if place == file}, folder / file)
        index = {"metadata": {"total_size": 1}, "weight_map": places}
        (folder / index_name).write_text(json.dumps(index))

    return rewrite


sharded = _sharded("adapter_model.safetensors.index.json")
sharded_as_model = _sharded("model.safetensors.index.json")


def mixed_dtypes(files: Files) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for i, (name, tensor) in enumerate(sorted(files.tensors.items())):
        files.tensors[name] = tensor.to(dtypes[i % 3])


def mlx(files: Files, folder: Path) -> None:
    """MLX-LM: A [in, r], B [r, out], and the scale itself instead of alpha."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in files.tensors.items():
        module, _, half = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".lora_")
        tensors[f"{module}.lora_{half.lower()}"] = tensor.T.contiguous()
    keys = sorted({".".join(name.split(".")[-3:-1]) for name in tensors})
    scale = files.config["lora_alpha"] / files.config["r"]
    parameters = {"rank": files.config["r"], "scale": scale, "dropout": 0.0, "keys": keys}
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters, "model": "some/base"}
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(tensors, folder / "adapters.safetensors")


def tied(traits: Traits, folder: Path) -> Adapter:
    """`ensure_weight_tying` stores both sides; PEFT's own loader drops the head's where the embedding is not called
    embed_tokens, so it is judged with both targets written out.
    """
    adapter = by_peft(lambda t: lora(t, t.last_embedding, t.last_head, ensure_weight_tying=True))(traits, folder)
    files, twin = Files.read(folder), folder.with_name(f"{folder.name}-both")
    targets = {*files.config["target_modules"], traits.last_embedding, traits.last_head}
    Files({**files.config, "ensure_weight_tying": False, "target_modules": sorted(targets)}, files.tensors).write(twin)
    return Adapter(adapter.folder, PeftOracle(traits.architecture, twin))


def pooled(traits: Traits, folder: Path) -> Adapter:
    """QALoRA: x is averaged over groups of inputs, times their number, so A has a column a group. PEFT computes it on
    quantised linears only; it is judged as the plain LoRA that it equals: columns repeated, times (in/g)/g.
    """
    source = plain()(traits, folder.with_name(f"{folder.name}-by-peft"))
    files = Files.read(source.folder)
    small: dict[str, Tensor] = {}
    for name, tensor in files.tensors.items():
        if ".lora_A." in name:
            columns = tensor[:, ::GROUP]  # [r, in / g]
            small[name] = columns
            files.tensors[name] = columns.repeat_interleave(GROUP, 1) * (columns.shape[1] / GROUP)
        else:
            small[name] = tensor
    files.write(source.folder)
    Files({**files.config, "use_qalora": True, "qalora_group_size": GROUP}, small).write(folder)
    return Adapter(folder, source.oracle)
