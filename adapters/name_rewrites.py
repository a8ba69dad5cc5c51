"""Other spellings of a base's module names → the base's own: wrappers inside, old and new layouts, sister classes.

One rule maps all names of an adapter alike, the head's aside, whose place in a class differs from the decoder's; two
rules that fit differently are no answer. Knows names only, of any kind of module; neither bases, shapes nor files.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

PREFIXES = (
    "",
    "model.",
    "model.model.",
    "model.language_model.",
    "model.language_model.model.",
    "language_model.",
    "language_model.model.",
    "model.text_model.",
    "text_model.",
    "transformer.",
    "gpt_neox.",
    "llm.",
    "llm.model.",
    "thinker.model.",
)
"""What wraps the same decoder in AutoModel, AutoModelForCausalLM and multimodal classes."""

INNER_WRAPPERS = frozenset({"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"})
"""Parts that FSDP, torch.compile and activation checkpointing put into names, anywhere."""

Renaming = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Rewrite:
    """name as the file has it → name in the base, and the rule, for people ("" = as it stands)."""

    modules: Mapping[str, str]
    rule: str


def rewrites(
    names: Sequence[str], is_known: Callable[[str], bool], *, head: str | None, checkpoint_name: Renaming | None
) -> list[Rewrite]:
    """Every way to map all `names`, no two to the same places: none, one, or several that contradict each other.

    Exact names are the only way if they fit, then what `checkpoint_name` (the base's own rules for old checkpoints)
    makes of them, then one exchange of a prefix. `head` is the name of the base's output layer.
    """
    bare = {name: _without_wrappers(name, is_known) for name in names}
    heads = {name: head for name in names if head is not None and _is_head(bare[name], head, is_known)}
    rest = [bare[name] for name in names if name not in heads]
    found = _exact(rest, is_known) or _renamed(rest, is_known, checkpoint_name) or _exchanged(rest, is_known)
    ways = [{name: heads.get(name) or way.modules[bare[name]] for name in names} for way in found]
    moved = any(name != target for name, target in heads.items())
    return [Rewrite(way, _rule(done.rule, moved, head)) for way, done in zip(ways, found, strict=True)]


def _rule(rule: str, moved: bool, head: str | None) -> str:
    return "; ".join(filter(None, (rule, f"* → {head}" if moved else "")))


def _without_wrappers(name: str, is_known: Callable[[str], bool]) -> str:
    if is_known(name):
        return name
    return ".".join(part for part in name.split(".") if part not in INNER_WRAPPERS)


def _is_head(name: str, head: str, is_known: Callable[[str], bool]) -> bool:
    """A class keeps its head beside the decoder, or wrappers put both into one module."""
    outer, _, last = name.rpartition(".")
    return (
        last == head.rpartition(".")[2]
        and (name == head or (f"{outer}." if outer else "") in PREFIXES)
        and (name == head or not is_known(name))
    )


def _exact(names: Sequence[str], is_known: Callable[[str], bool]) -> list[Rewrite]:
    return [Rewrite({name: name for name in names}, "")] if all(map(is_known, names)) else []


def _renamed(names: Sequence[str], is_known: Callable[[str], bool], renaming: Renaming | None) -> list[Rewrite]:
    if renaming is None:
        return []
    modules = {name: renaming(name) for name in names}
    if not all(map(is_known, modules.values())):
        return []
    first = next(name for name in names if modules[name] != name)
    return [Rewrite(modules, f"{first} → {modules[first]} and so on, as transformers renames checkpoints")]


def _exchanged(names: Sequence[str], is_known: Callable[[str], bool]) -> list[Rewrite]:
    """One prefix for another, by where the first name comes to stand."""
    found: dict[str, Rewrite] = {}
    for old in PREFIXES:
        if not all(name.startswith(old) for name in names):
            continue
        for new in PREFIXES:
            target = new + names[0][len(old) :]
            if target in found or not is_known(target):
                continue
            modules = {name: new + name[len(old) :] for name in names}
            if all(map(is_known, modules.values())):
                found[target] = Rewrite(modules, f"{old}* → {new}*")
    return list(found.values())
