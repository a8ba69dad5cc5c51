"""The adapters of the churn: more sets of random weights than names, of several ranks, and strong enough to tell apart.

Shapes are read from the base's config.json, for any decoder laid out as Llama's. Knows nothing of servers.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from loadtest.peft_adapters import write_adapter

RANKS = (8, 16, 24, 16)
"""In turns, so that the rows one adapter leaves do not fit the next."""

_SCALE = 0.08  # of the random weights: an adapter must answer otherwise than the base from the first tokens on


def linear_shapes(model: Path) -> dict[str, tuple[int, int]]:
    """Module name → (in_features, out_features) of all decoder layers of the model in the folder."""
    config = json.loads((model / "config.json").read_text())
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    queries, keys = heads * head, (config.get("num_key_value_heads") or heads) * head
    layer = {
        "self_attn.q_proj": (hidden, queries),
        "self_attn.k_proj": (hidden, keys),
        "self_attn.v_proj": (hidden, keys),
        "self_attn.o_proj": (queries, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    return {
        f"model.layers.{index}.{name}": shape
        for index in range(config["num_hidden_layers"])
        for name, shape in layer.items()
    }


def write_sources(folder: Path, model: Path, count: int, *, ranks: Sequence[int] = RANKS) -> list[Path]:
    """`count` adapters for the model, each of other bytes."""
    shapes = linear_shapes(model)
    sources = [folder / f"bytes{seed}" for seed in range(count)]
    for seed, source in enumerate(sources):
        write_adapter(source, shapes, seed, model.name, rank=ranks[seed % len(ranks)], scale=_SCALE)
    return sources


def most_that_fit(adapters: int) -> int:
    """How many of the narrowest rank find room where `adapters` of the mean rank do."""
    return adapters * sum(RANKS) // (len(RANKS) * min(RANKS))


def pool_bytes(model: Path, adapters: int, *, bytes_per_value: int) -> int:
    """Device memory that holds `adapters` adapters of the mean rank and not one more."""
    row = sum(map(sum, linear_shapes(model).values())) * bytes_per_value
    return row * adapters * sum(RANKS) // len(RANKS)
