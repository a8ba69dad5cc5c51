"""What a tensor's name in an adapter file says: which half of which module, or which feature that is not served.

`base_model.model.<module>.lora_A.weight` is PEFT's spelling, `<module>.lora_A.<adapter>.weight` a raw state dict's;
wrappers that all names share (DDP, FSDP, torch.compile) are taken off. Knows nothing of the base's modules.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from adapters.errors import AdapterRefused, RefusalCode
from adapters.untrusted_json import shown

Half = Literal["lora_A", "lora_B"]

WRAPPERS = ("base_model.model.", "module.", "_orig_mod.", "_fsdp_wrapped_module.")

_PEFT_FIX = "Save the adapter again with PEFT's save_pretrained"
_FOREIGN: tuple[tuple[str, str, str, str], ...] = (
    # part of the name, feature, why, fix
    ("lora_magnitude_vector", "use_dora", "DoRA rescales every output by a learned magnitude", "Train without DoRA"),
    ("lora_embedding_", "target_modules=embedding", "LoRA on embeddings is not served", "Target linear modules only"),
    ("token_adapter", "trainable_token_indices", "rows of the embedding are replaced", "Train without it"),
    (
        "modules_to_save",
        "modules_to_save",
        "whole modules are replaced, not adapted",
        "Train with modules_to_save=None",
    ),
    ("lora_E", "peft_type=ADALORA", "AdaLoRA scales every rank by a learned value", "Convert it to LoRA with PEFT"),
    ("lora_velora", "velora_config", "VeLoRA adds tensors of its own", "Train without it"),
    ("lora_monteclora", "monteclora_config", "MonteCLoRA adds tensors of its own", "Train without it"),
    ("lora_diag", "kasa_config", "KaSA takes singular components away from the base", "Train without it"),
    ("lora_unet_", "format=kohya", "this is a LoRA for an image model", "Serve it where its base is served"),
    ("lora_te_", "format=kohya", "this is a LoRA for an image model", "Serve it where its base is served"),
    ("lora_down", "format=kohya", "this is a LoRA for an image model", "Serve it where its base is served"),
    ("lora_up", "format=kohya", "this is a LoRA for an image model", "Serve it where its base is served"),
    ("lora_a", "format=mlx or torchtune", "lower-case lora_a is another layout and scale", "Export it to PEFT"),
    ("lora_b", "format=mlx or torchtune", "lower-case lora_b is another layout and scale", "Export it to PEFT"),
)
_MARKS = frozenset(mark for mark, *_ in _FOREIGN)
_MARKED_BEGINNINGS = tuple(mark for mark in _MARKS if mark.endswith("_"))


@dataclass(frozen=True, slots=True)
class TensorName:
    """One name, read: half `half` of `module`, the latter as the file spells it without wrappers."""

    key: str
    module: str
    half: Half


def read_names(keys: Sequence[str]) -> list[TensorName]:
    """Read all names of an adapter. Raises AdapterRefused naming the tensor when one of them is not plain LoRA."""
    wrapper = common_wrapper(keys)
    read = [_read_name(key, len(wrapper)) for key in keys]
    infixes = sorted({infix for _, infix in read})
    if len(infixes) > 1:
        shown_infixes = ", ".join(shown(infix) or "none" for infix in infixes[:3])
        raise AdapterRefused(
            RefusalCode.AMBIGUOUS_LAYOUT,
            f"the tensors carry {len(infixes)} adapter names ({shown_infixes}), so which of them is meant is unknown",
            "Save one adapter per folder",
            tensor=next(name.key for name, infix in read if infix == infixes[-1]),
        )
    return [name for name, _ in read]


def common_wrapper(keys: Sequence[str]) -> str:
    """The chain of wrappers that every key begins with; a wrapper only some carry is left on, and will not match."""
    wrapper = ""
    while found := next((w for w in WRAPPERS if _all_start_with(keys, wrapper + w)), None):
        wrapper += found
    return wrapper


def _all_start_with(keys: Iterable[str], prefix: str) -> bool:
    return all(key.startswith(prefix) for key in keys)


def _read_name(key: str, num_wrapped: int) -> tuple[TensorName, str]:
    """The name and the adapter name inside it ("" = none)."""
    _refuse_foreign(key)
    parts = key[num_wrapped:].split(".")
    halves = [i for i, part in enumerate(parts) if part in ("lora_A", "lora_B")]
    if len(halves) != 1 or halves[0] == 0:
        raise _unreadable(key)
    at = halves[0]
    tail = parts[at + 1 :]
    if tail[-1:] == ["bias"] and len(tail) <= 2:
        raise _unsupported(key, "lora_bias", "LoRA's B carries a bias of its own", "Train with lora_bias=False")
    if not tail:
        raise _unsupported(key, "format=loralib", "the scale of a loralib file is not in the file", _PEFT_FIX)
    if tail[-1] != "weight" or len(tail) > 2:
        raise _unreadable(key)
    half: Half = "lora_A" if parts[at] == "lora_A" else "lora_B"
    return TensorName(key, ".".join(parts[:at]), half), ".".join(tail[:-1])


def _refuse_foreign(key: str) -> None:
    parts = key.split(".")
    if not _MARKS.isdisjoint(parts) or any(part.startswith(_MARKED_BEGINNINGS) for part in parts):
        raise _foreign(key, parts)
    if "base_layer" in parts:
        if any(part.startswith("lora_") for part in parts):
            raise _unsupported(key, "target_parameters", "LoRA on fused experts is not served", "Target linears only")
        why = "the file carries a copy of a weight of the base, which would have to replace it"
        raise _unsupported(key, "save_embedding_layers", why, "Save with save_embedding_layers=False")
    if parts[-1] in ("weight", "bias") and not any(part.startswith("lora") for part in parts):
        why = "the file carries a whole weight that replaces one of the base"
        raise _unsupported(key, "modules_to_save", why, "Train with modules_to_save=None and bias='none'")


def _foreign(key: str, parts: Sequence[str]) -> AdapterRefused:
    """For the first of the marks that the name has."""
    for mark, feature, why, fix in _FOREIGN:
        if any(part == mark or (mark.endswith("_") and part.startswith(mark)) for part in parts):
            return _unsupported(key, feature, why, fix)
    return _unreadable(key)


def _unsupported(key: str, feature: str, why: str, fix: str) -> AdapterRefused:
    return AdapterRefused(RefusalCode.UNSUPPORTED, why, fix, feature=feature, tensor=key)


def _unreadable(key: str) -> AdapterRefused:
    why = "the name is not <module>.lora_A.weight or <module>.lora_B.weight, and no tensor may be left over"
    return AdapterRefused(RefusalCode.KEY_UNMATCHED, why, _PEFT_FIX, tensor=key)
