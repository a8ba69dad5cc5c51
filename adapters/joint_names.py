"""Names of wider linears that other models have in place of several of the base's: q, k and v, or gate and up.

Phi-3's names alone, since they say the order and that each part's outputs lie together; those of other models are used
for several layouts. Knows names only.
"""

from collections.abc import Collection, Mapping

JOINT: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


def joint_names(linears: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Name of a wider linear that the base has not → those it has in its place, in the order of its outputs."""
    found: dict[str, tuple[str, ...]] = {}
    for wide, parts in JOINT.items():
        for linear in linears:
            outer, dot, last = linear.rpartition(".")
            names = tuple(f"{outer}{dot}{part}" for part in parts)
            if last == parts[0] and f"{outer}{dot}{wide}" not in linears and all(name in linears for name in names):
                found[f"{outer}{dot}{wide}"] = names
    return found
