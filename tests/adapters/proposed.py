"""Hand-made proposals run on a small hand-made base: what placing and running them is tested with."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from adapters.adapter_folder import AdapterFolder
from adapters.base_parts import EmbeddingShape, HeadShape, NormShape
from adapters.base_weights import BaseWeights
from adapters.header_table import read_table
from adapters.load_plan import LoadPlan, plan_load
from adapters.module_names import BaseModules, LinearShape
from adapters.placement import place
from adapters.proposal import PairProposal, Proposal
from adapters.run_plan import Ran, run
from adapters.weight_files import open_weights
from tests.adapters.hostile import WEIGHTS, write_config

V, H, OUT = 20, 6, 10
Q, K, NORM, EMBED, HEAD = "model.q_proj", "model.k_proj", "model.norm", "model.embed_tokens", "lm_head"

BASE = BaseModules(
    "tiny",
    {Q: LinearShape(H, OUT), K: LinearShape(H, OUT)},
    biased=frozenset({Q, HEAD}),
    embedding=EmbeddingShape(EMBED, V, H),
    head=HeadShape(HEAD, H, V, has_bias=True),
    norms={NORM: NormShape((H,), has_bias=False)},
)


def tied(base: BaseModules = BASE) -> BaseModules:
    assert base.head is not None
    return replace(base, head=replace(base.head, is_tied=True))


@dataclass
class FakeWeights:
    """Random, and counts what is asked for."""

    fingerprint: str = "print"
    tensors: dict[str, Tensor] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        draw = torch.Generator().manual_seed(7)
        for name, shape in {Q: (OUT, H), K: (OUT, H), EMBED: (V, H), HEAD: (V, H)}.items():
            self.tensors[f"{name}.weight"] = torch.randn(*shape, generator=draw)
            self.tensors[f"{name}.bias"] = torch.randn(shape[0], generator=draw)

    def shape(self, parameter: str) -> tuple[int, ...] | None:
        found = self.tensors.get(parameter)
        return None if found is None else tuple(found.shape)

    def rows(self, parameter: str, begin: int, end: int) -> Tensor:
        self.asked.append(parameter)
        return self.tensors[parameter][begin:end].clone()


def pair(source: str = Q, *, r: int = 2, **fields: Any) -> PairProposal:
    return PairProposal(
        **{"source": source, "inputs": (f"{source}.A", f"{source}.B"), "scale": 2.0, "lora_rank": r, **fields}
    )


def of_pair(source: str = Q, *, r: int = 2, in_features: int = H, out_features: int = OUT) -> dict[str, Tensor]:
    return {f"{source}.A": torch.randn(r, in_features), f"{source}.B": torch.randn(out_features, r)}


def run_proposal(
    folder: Path,
    proposal: Proposal,
    tensors: Mapping[str, Tensor],
    *,
    base: BaseModules = BASE,
    weights: BaseWeights | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Ran:
    folder.mkdir(exist_ok=True)
    write_config(folder, {})
    save_file(dict(tensors), folder / WEIGHTS)
    with AdapterFolder.find(folder) as found, open_weights(found, max_bytes=1 << 30) as files:
        table = read_table(files)
        placement = place(proposal, table.entries, base, max_lora_rank=64)
        plan: LoadPlan = plan_load(placement, table, base, dtype)
        return run(plan, files.files, b"{}", dtype, weights=weights, **options)
