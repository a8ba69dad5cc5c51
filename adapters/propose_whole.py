"""What files of any PEFT method hold beside the method's own tensors: whole modules, biases, rows of trained tokens.

modules_to_save, bias=all, save_embedding_layers and trainable_token_indices write the same names under every method.
Values are absolute: they replace the base's. Knows nothing of the base, so an embedding, a head and any other linear
look alike here, and a vector is a norm's or a bias.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from adapters.errors import AdapterRefused, RefusalCode
from adapters.key_roles import Role, TensorKey, by_module
from adapters.proposal import Proposal, TokensProposal, VectorProposal, WholeProposal, joined
from adapters.recipe import Recipe
from adapters.refusals import TOKEN_LOGITS, incomplete, shape_mismatch
from adapters.safetensors_header import TensorEntry
from adapters.untrusted_json import shown

WHOLE_ROLES = frozenset(
    {
        Role.WEIGHT,
        Role.BIAS,
        Role.COPY,
        Role.SAVED_WEIGHT,
        Role.SAVED_BIAS,
        Role.ORIGINAL,
        Role.TOKENS,
    }
)
_CLASSIFIERS = frozenset("score classifier classification_head qa_outputs".split())
_CLASSIFYING_TASKS = frozenset("SEQ_CLS TOKEN_CLS QUESTION_ANS".split())
_TOKEN_IDS = "trainable_token_indices"

Entries = Mapping[str, TensorEntry]


def propose_whole(recipe: Recipe, keys: Sequence[TensorKey], entries: Entries) -> Proposal:
    """From the keys whose roles are WHOLE_ROLES; all others are somebody else's. Raises AdapterRefused."""
    modules = by_module(key for key in keys if key.role in WHOLE_ROLES and key.role is not Role.ORIGINAL)
    each = [_propose_module(recipe, module, roles, entries) for module, roles in modules.items()]
    found = joined(_originals(keys, modules), *each)
    tokens = _tokens(recipe, modules, entries)
    _check_saved(recipe, [*modules])
    biases = [v for v in found.vectors if v.kind == "bias" and not _is_saved(recipe, v.source)]
    return replace(
        found,
        tokens=tokens,
        features=_features(found, tokens, biases),
        warnings=_warnings(recipe, [*modules], biases),
    )


def _propose_module(recipe: Recipe, module: str, roles: Mapping[Role, str], entries: Entries) -> Proposal:
    """A vector of one weight is a norm's; a matrix is a whole module. Where PEFT wrote a saved module under two
    spellings, the one that PEFT itself reads is taken."""
    _check_task(recipe, module, roles)
    weight = roles.get(Role.WEIGHT, roles.get(Role.SAVED_WEIGHT))
    bias = roles.get(Role.BIAS, roles.get(Role.SAVED_BIAS))
    twice = tuple(
        roles[saved]
        for own, saved in ((Role.WEIGHT, Role.SAVED_WEIGHT), (Role.BIAS, Role.SAVED_BIAS))
        if own in roles and saved in roles
    )
    biases = () if bias is None else (VectorProposal(kind="bias", source=module, input=bias),)
    copy = roles.get(Role.COPY)
    if copy is not None:
        _check_alone(copy, weight)
        _num_dimensions(entries[copy], module)
        whole = WholeProposal(source=module, weight=copy, is_copy=True)
        return Proposal(wholes=(whole,), vectors=biases, dropped=twice)
    if weight is None:
        return Proposal(vectors=biases, dropped=twice)
    if _num_dimensions(entries[weight], module) == 1:
        norm = VectorProposal(kind="norm", source=module, input=weight)
        return Proposal(vectors=(norm, *biases), dropped=twice)
    is_copy = Role.SAVED_WEIGHT not in roles and not _is_saved(recipe, module)
    return Proposal(wholes=(WholeProposal(source=module, weight=weight, bias=bias, is_copy=is_copy),), dropped=twice)


def _check_alone(copy: str, weight: str | None) -> None:
    if weight is not None:
        raise AdapterRefused(
            RefusalCode.AMBIGUOUS_LAYOUT,
            f"the file holds this whole weight and {copy}, of one module",
            "Save one of them",
            tensor=weight,
        )


def _num_dimensions(entry: TensorEntry, module: str) -> int:
    if 0 in entry.shape:
        raise AdapterRefused(
            RefusalCode.CORRUPT,
            f"the tensor has the shape {list(entry.shape)} and holds no numbers",
            "This is what a ZeRO-3 run saves without gathering: gather the parameters and save again",
            tensor=entry.name,
        )
    if len(entry.shape) not in (1, 2):
        raise AdapterRefused(
            RefusalCode.UNSUPPORTED,
            f"the tensor has {len(entry.shape)} dimensions; whole weights are served of norms, embeddings and heads",
            "Leave the module out of modules_to_save",
            feature=f"modules_to_save={shown(module)}",
            tensor=entry.name,
        )
    return len(entry.shape)


def _originals(keys: Iterable[TensorKey], modules: Mapping[str, Mapping[Role, str]]) -> Proposal:
    """What modules_to_save replaced changes nothing, if what replaced it is there; alone it is a copy of the base."""
    dropped, wholes = [], []
    for key in keys:
        if key.role is not Role.ORIGINAL:
            continue
        if modules.get(key.module, {}).keys() & {Role.WEIGHT, Role.SAVED_WEIGHT, Role.COPY}:
            dropped.append(key.key)
        elif key.key.endswith(".weight"):
            wholes.append(WholeProposal(source=key.module, weight=key.key, is_copy=True))
        else:
            raise incomplete(key.key, "it is what a saved module replaced, and the module that was saved is not there")
    return Proposal(wholes=tuple(wholes), dropped=tuple(dropped))


def _tokens(recipe: Recipe, modules: Mapping[str, Mapping[Role, str]], entries: Entries) -> tuple[TokensProposal, ...]:
    found = {module: roles[Role.TOKENS] for module, roles in modules.items() if Role.TOKENS in roles}
    if recipe.token_ids and not found:
        why = "the config lists trained tokens, and their rows are not in the file"
        raise AdapterRefused(
            RefusalCode.INCOMPLETE_PAIR, why, "The file is incomplete: save the adapter again", feature=_TOKEN_IDS
        )
    proposals = []
    for module, key in found.items():
        token_ids, shape = _ids_of(recipe, module, key), entries[key].shape
        if len(shape) != 2 or shape[0] != len(token_ids):
            why = f"the tensor is {list(shape)}, and the config lists {len(token_ids)} tokens for it"
            raise shape_mismatch(key, why, feature=_TOKEN_IDS)
        proposals.append(TokensProposal(source=module, input=key, ids=token_ids, is_only=len(found) == 1))
    return tuple(proposals)


def _ids_of(recipe: Recipe, module: str, key: str) -> tuple[int, ...]:
    """By the module's last name parts; a plain list is the input embedding's, which then alone has rows."""
    matching = [ids for name, ids in recipe.token_ids if f".{module}".endswith(f".{name}") or not name]
    if not matching:
        why = "the rows are of tokens that the config does not list, and only the config does"
        raise incomplete(key, why, feature=_TOKEN_IDS)
    if len(matching) > 1:
        raise AdapterRefused(
            RefusalCode.AMBIGUOUS_LAYOUT,
            f"{len(matching)} entries of {_TOKEN_IDS} are for this module",
            "Keep one of them",
            feature=_TOKEN_IDS,
            tensor=key,
        )
    return matching[0]


def _check_task(recipe: Recipe, module: str, roles: Mapping[Role, str]) -> None:
    if recipe.task_type in _CLASSIFYING_TASKS and module.rpartition(".")[2] in _CLASSIFIERS:
        raise TOKEN_LOGITS.error(feature=f"task_type={recipe.task_type}", tensor=next(iter(roles.values())))


def _check_saved(recipe: Recipe, modules: Sequence[str]) -> None:
    """One list is for many architectures, so some of its names may be of no module; all of them may not."""
    if recipe.modules_to_save and not any(_is_saved(recipe, module) for module in modules):
        raise AdapterRefused(
            RefusalCode.INCOMPLETE_PAIR,
            "the config says that modules were saved whole, and none of them is in the file",
            "The file is incomplete: save the adapter again",
            feature=f"modules_to_save={shown(list(recipe.modules_to_save))}",
        )


def _is_saved(recipe: Recipe, module: str) -> bool:
    """PEFT asks how a name ends, not for whole parts: "norm" is also post_attention_layernorm."""
    return module.endswith(recipe.modules_to_save) if recipe.modules_to_save else False


def _features(found: Proposal, tokens: Sequence[TokensProposal], biases: Sequence[VectorProposal]) -> tuple[str, ...]:
    features = {
        "modules_to_save": len(found.vectors) > len(biases) or any(not whole.is_copy for whole in found.wholes),
        "base copies": any(whole.is_copy for whole in found.wholes),
        "bias": bool(biases),
        "trainable tokens": bool(tokens),
    }
    return tuple(name for name, is_found in features.items() if is_found)


def _warnings(recipe: Recipe, modules: Sequence[str], biases: Sequence[VectorProposal]) -> tuple[str, ...]:
    warnings = []
    absent = [name for name in recipe.modules_to_save if not any(module.endswith(name) for module in modules)]
    if absent:
        warnings.append(f"modules_to_save lists {', '.join(map(shown, absent[:5]))}, of which the file holds nothing")
    if biases and recipe.bias == "none":
        warnings.append(f"the config says bias=none; {len(biases)} biases in the file are served all the same")
    return tuple(warnings)
