"""What the name of a tensor says: which part (Role) of which module, in the spellings of every method that is read.

`base_model.model.<module>.lora_A.weight` is PEFT's, `<module>.lora_A.<adapter>.weight` a raw state dict's. Wrappers of
training (DDP, FSDP, checkpointing, torch.compile) are taken off wherever they stand. Exact tables, no searching within
names: what is of no form is no tensor of ours. Knows nothing of the base's modules, of shapes or of scales.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from adapters.errors import AdapterRefused, RefusalCode
from adapters.refusals import LORALIB, refused_part, unmatched
from adapters.tensor_names import common_wrapper
from adapters.untrusted_json import shown


class Role(Enum):
    """Part of a module that a tensor is."""

    A = auto()
    B = auto()
    B_BIAS = auto()
    MAGNITUDE = auto()
    EMBEDDING_A = auto()
    EMBEDDING_B = auto()
    BARE_A = auto()  # without .weight: AdaLoRA's, or loralib's
    BARE_B = auto()
    E = auto()
    TOKENS = auto()
    WEIGHT = auto()  # whole weight or bias in place of the base's
    BIAS = auto()
    COPY = auto()  # whole weight of the base, saved beside what adapts it
    SAVED_WEIGHT = auto()  # the same as WEIGHT and BIAS, spelled with modules_to_save
    SAVED_BIAS = auto()
    ORIGINAL = auto()  # what modules_to_save replaced
    VELORA = auto()
    MONTECLORA = auto()
    VERA_A = auto()
    VERA_B = auto()
    LAMBDA_B = auto()
    LAMBDA_D = auto()
    W1_A = auto()
    W1_B = auto()
    W2_A = auto()
    W2_B = auto()
    CONV = auto()
    DELORA_A = auto()
    DELORA_B = auto()
    DELORA_LAMBDA = auto()
    DELORA_W_NORM = auto()
    MISS = auto()
    IA3 = auto()
    NORM_WEIGHT = auto()
    NORM_BIAS = auto()
    MLX_A = auto()
    MLX_B = auto()
    MLX_M = auto()


@dataclass(frozen=True, slots=True)
class TensorKey:
    """One name, read. `module` is spelled as in the file, without wrappers."""

    key: str
    module: str
    role: Role


_MARKS: Mapping[str, Mapping[str, Role]] = {
    # part of the name → what may follow it, after the adapter's own name where that stands there → role
    "lora_A": {"weight": Role.A, "": Role.BARE_A},
    "lora_B": {"weight": Role.B, "bias": Role.B_BIAS, "": Role.BARE_B},
    "lora_E": {"": Role.E},
    "lora_embedding_A": {"": Role.EMBEDDING_A},
    "lora_embedding_B": {"": Role.EMBEDDING_B},
    "lora_magnitude_vector": {"": Role.MAGNITUDE, "weight": Role.MAGNITUDE},
    "lora_velora_embed": {"": Role.VELORA},
    "trainable_tokens_delta": {"": Role.TOKENS},
    "modules_to_save": {"weight": Role.SAVED_WEIGHT, "bias": Role.SAVED_BIAS},
    "vera_A": {"": Role.VERA_A},
    "vera_B": {"": Role.VERA_B},
    "vera_lambda_b": {"": Role.LAMBDA_B},
    "vera_lambda_d": {"": Role.LAMBDA_D},
    "hada_w1_a": {"": Role.W1_A},
    "hada_w1_b": {"": Role.W1_B},
    "hada_w2_a": {"": Role.W2_A},
    "hada_w2_b": {"": Role.W2_B},
    "hada_t1": {"": Role.CONV},
    "hada_t2": {"": Role.CONV},
    "delora_A": {"": Role.DELORA_A},
    "delora_B": {"": Role.DELORA_B},
    "delora_lambda": {"": Role.DELORA_LAMBDA},
    "delora_w_norm": {"": Role.DELORA_W_NORM},
    "miss_block": {"": Role.MISS},
    "ia3_l": {"": Role.IA3},
    "ln_tuning_layers": {"weight": Role.NORM_WEIGHT, "bias": Role.NORM_BIAS},
}
_MLX_MARKS: Mapping[str, Role] = {"lora_a": Role.MLX_A, "lora_b": Role.MLX_B, "m": Role.MLX_M}
_MONTECLORA_FORMS = frozenset(
    """
    expert_weights expert_weights_prior gaussian_var_prior std_prior
    """.split()
)
_STRUCTURE = ("base_layer", "original_module", "token_adapter")
_TRAINING = frozenset("_fsdp_wrapped_module _orig_mod _checkpoint_wrapped_module".split())
"""Wrappers that may stand between any two parts of a name; `module` is one only in front."""
_SHARED = ("vera_A", "vera_B")
"""Projections of the whole model: they stand at its root, outside the prefix that all other names share."""


def read_keys(keys: Sequence[str]) -> list[TensorKey]:
    """Read all names of a PEFT file. Raises AdapterRefused naming the tensor: adapter_key_unmatched for a name of no
    form, adapter_unsupported for a foreign format's, adapter_ambiguous_layout for two adapters in one file."""
    shared = [key for key in keys if any(part in _SHARED for part in key.split("."))]
    own = [key for key in keys if key not in set(shared)]
    wrapper = common_wrapper(own) if own else ""
    read = [(_read_shared(key)) for key in shared] + [_read_key(key, len(wrapper)) for key in own]
    _check_infixes([(key, infix) for key, infix in read])
    found = [key for key, _ in read]
    _check_different(found)
    return found


def read_mlx_keys(keys: Iterable[str]) -> list[TensorKey]:
    """Read all names of an MLX-LM file: `<module>.lora_a`, `.lora_b` and, of DoRA, `.m`."""
    found = []
    for key in keys:
        module, _, last = key.rpartition(".")
        if last not in _MLX_MARKS or not module:
            raise unmatched(key, "the name is not <module>.lora_a, .lora_b or .m, and no tensor may be left over")
        found.append(TensorKey(key, module, _MLX_MARKS[last]))
    return found


def by_module(keys: Iterable[TensorKey]) -> dict[str, dict[Role, str]]:
    """module → role → the tensor's name, modules in alphabetical order."""
    found: dict[str, dict[Role, str]] = {}
    for key in sorted(keys, key=lambda key: key.module):
        found.setdefault(key.module, {})[key.role] = key.key
    return found


def require_roles(keys: Iterable[TensorKey], served: Collection[Role]) -> None:
    """Raises AdapterRefused for the first tensor whose role this method does not have."""
    for key in keys:
        if key.role in served:
            continue
        if key.role in (Role.BARE_A, Role.BARE_B):
            raise LORALIB.error(tensor=key.key)
        raise unmatched(key.key)


def _read_shared(key: str) -> tuple[TensorKey, str | None]:
    parts = key.split(".")
    at = next(i for i, part in enumerate(parts) if part in _SHARED)
    if len(parts) > at + 2:
        raise unmatched(key)
    infix = parts[at + 1] if len(parts) == at + 2 else ""
    return TensorKey(key, "", _MARKS[parts[at]][""]), infix


def _read_key(key: str, num_wrapped: int) -> tuple[TensorKey, str | None]:
    """The name and the adapter's own name inside it: "" where it might stand and does not, None where it never does."""
    parts = [part for part in key[num_wrapped:].split(".") if part not in _TRAINING]
    at = next((i for i, part in enumerate(parts) if part in _MARKS or part == "lora_monteclora_sampler"), None)
    if at is not None:
        role, infix = _role_after(key, parts[at], parts[at + 1 :])
        return TensorKey(key, _module(key, parts[:at], role), role), infix
    if (refusal := refused_part(key)) is not None:
        raise refusal.error(tensor=key)
    return _read_whole(key, parts), None


def _role_after(key: str, mark: str, tail: list[str]) -> tuple[Role, str]:
    if mark == "lora_monteclora_sampler":
        if tail and tail[-1] in _MONTECLORA_FORMS and len(tail) <= 2:
            return Role.MONTECLORA, ".".join(tail[:-1])
        raise unmatched(key)
    forms = _MARKS[mark]
    if len(tail) <= 1 and (form := "".join(tail)) in forms:
        return forms[form], ""
    if len(tail) == 1 and "" in forms:
        return forms[""], tail[0]
    if len(tail) == 2 and tail[1] in forms:
        return forms[tail[1]], tail[0]
    raise unmatched(key)


def _module(key: str, parts: list[str], role: Role) -> str:
    """The module that the tensor adapts. A wrapper of PEFT's stays in its name for pairs: the pair is then one of
    several on one module, as on fused experts."""
    if role is Role.TOKENS:
        if parts[-1:] != ["token_adapter"]:
            raise unmatched(key)
        parts = parts[:-1]
    if not parts:
        raise unmatched(key)
    return ".".join(parts)


def _read_whole(key: str, parts: list[str]) -> TensorKey:
    """`<module>.weight` or `.bias`, with or without PEFT's wrappers of the module between."""
    if len(parts) < 2 or parts[-1] not in ("weight", "bias"):
        raise unmatched(key)
    module = list(parts[:-1])
    wrappers = []
    while module and module[-1] in _STRUCTURE:
        wrappers.append(module.pop())
    if not module:
        raise unmatched(key)
    if "original_module" in wrappers:
        role = Role.ORIGINAL
    elif parts[-1] == "bias":
        role = Role.BIAS
    else:
        role = Role.COPY if wrappers else Role.WEIGHT
    return TensorKey(key, ".".join(module), role)


def _check_infixes(found: Sequence[tuple[TensorKey, str | None]]) -> None:
    infixes = sorted({infix for _, infix in found if infix is not None})
    if len(infixes) > 1:
        shown_infixes = ", ".join(shown(infix) or "none" for infix in infixes[:3])
        raise AdapterRefused(
            RefusalCode.AMBIGUOUS_LAYOUT,
            f"the tensors carry {len(infixes)} adapter names ({shown_infixes}), so which of them is meant is unknown",
            "Save one adapter per folder",
            tensor=next(key.key for key, infix in found if infix == infixes[-1]),
        )


def _check_different(found: Sequence[TensorKey]) -> None:
    """Two spellings of one thing, such as with and without a wrapper, would overwrite each other."""
    seen: dict[tuple[str, Role], str] = {}
    for key in found:
        if key.role in (Role.MONTECLORA, Role.ORIGINAL):
            continue
        if (other := seen.setdefault((key.module, key.role), key.key)) != key.key:
            raise AdapterRefused(
                RefusalCode.AMBIGUOUS_LAYOUT,
                f"the tensor and {other} are two spellings of one thing",
                "Save one of them",
                tensor=key.key,
            )
