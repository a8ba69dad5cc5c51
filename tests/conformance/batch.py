"""All adapters of an architecture as rows of one batch beside a base row, through the real engine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.adapter_ref import AdapterUse, AdapterVersion
from adapters.errors import AdapterRefused
from server.engine.request import Request, SamplingParams
from tests.conformance.composed import SumOracle
from tests.conformance.making import Adapter
from tests.conformance.models import VOCAB, save
from tests.conformance.oracle import BaseOracle, Oracle, PeftOracle, last_begin
from tests.conformance.traits import traits
from tests.conformance.variants import SUMS, VARIANTS
from tests.equivalence.harness import EngineHarness, Squeeze

NUM_TOKENS = 32
BASE = "base"
ROOMY = Squeeze(max_num_seqs=96, max_num_batched_tokens=24, lora_memory=64 << 20)
TIGHT = Squeeze(max_num_seqs=20, max_num_batched_tokens=17, lora_memory=64 << 20)

Uses = tuple[tuple[str, float], ...]  # variants with their weights; () = base


@dataclass(frozen=True)
class Row:
    name: str
    prompt: tuple[int, ...]
    uses: Uses
    oracle: Oracle
    vocab_size: int | None = None
    does_nothing: bool = False


@dataclass
class World:
    """One architecture: its base in a folder, its adapters, and the rows that are to be served."""

    architecture: str
    base: Path
    adapters: dict[str, Adapter]
    rows: list[Row]

    @classmethod
    def make(cls, architecture: str, names: Sequence[str], folder: Path) -> "World":
        """`names` are variants and sums; every one exists for the architecture."""
        needed = {part for name in names for part, _ in SUMS.get(name, ((name, 1.0),))}
        own = traits(architecture)
        adapters = {name: VARIANTS[name].make(own, folder / name) for name in VARIANTS if name in needed}
        world = cls(architecture, save(architecture, folder / "base"), adapters, [])
        base = Row(BASE, prompt_of(BASE), (), BaseOracle(architecture), does_nothing=True)
        world.rows = [base, *(world._row(name) for name in names)]
        return world

    def _row(self, name: str) -> Row:
        if name in SUMS:
            parts = [(self.adapters[part].oracle, weight) for part, weight in SUMS[name]]
            peft = tuple((oracle, weight) for oracle, weight in parts if isinstance(oracle, PeftOracle))
            assert len(peft) == len(parts), "sums are of what PEFT computes"
            return Row(name, prompt_of(name), SUMS[name], SumOracle(self.architecture, peft))
        adapter, variant = self.adapters[name], VARIANTS[name]
        prompt = prompt_of(name, variant.prompt_tokens)
        return Row(name, prompt, ((name, 1.0),), adapter.oracle, adapter.vocab_size, variant.does_nothing)


def prompt_of(name: str, needed: Sequence[int] = ()) -> tuple[int, ...]:
    """Ids of its own for every row, so that none hits another's prefix; images' ids are left out."""
    generator = torch.Generator().manual_seed(sum(i * ord(letter) for i, letter in enumerate(name, 1)))
    length = int(torch.randint(9, 17, (), generator=generator))
    ids = torch.randint(3, 90, (length,), generator=generator).tolist()
    return (*ids[:4], *needed, *ids[4:])


@dataclass
class Served:
    """A run: what was answered, and which adapters were refused."""

    harness: EngineHarness
    refused: dict[str, AdapterRefused]

    def tokens(self, row: Row) -> list[int]:
        return self.harness.tokens(row.name)

    def logits(self, row: Row, width: int) -> Tensor:
        """[NUM_TOKENS, width], float32. What lies beyond are other rows' tokens: that none of them is chosen shows in
        the tokens, which are the oracle's."""
        kept = self.harness.logits[row.name]
        return torch.stack([kept[i][:width] for i in range(NUM_TOKENS)])


def load_all(harness: EngineHarness, adapters: Mapping[str, Adapter]) -> tuple[dict[str, AdapterVersion], Served]:
    versions: dict[str, AdapterVersion] = {}
    served = Served(harness, {})
    for name, adapter in adapters.items():
        try:
            versions[name] = harness.load(adapter.folder)
        except AdapterRefused as refusal:
            served.refused[name] = refusal
    return versions, served


def serve(
    world: World,
    squeeze: Squeeze,
    *,
    rows: Sequence[Row] | None = None,
    plainly: bool = False,
    dtype: str = "float32",
    use_graphs: bool = True,
) -> Served:
    """Run the rows whose adapters are accepted in one batch; `plainly`: the same rows, all of them of the base."""
    harness = EngineHarness.open(world.base, dtype, squeeze, use_graphs=use_graphs)
    versions, served = load_all(harness, world.adapters)
    for row in world.rows if rows is None else rows:
        if all(name in versions for name, _ in row.uses):
            _admit(harness, row, () if plainly else _uses(harness, row, versions), plainly)
    harness.run()
    return served


def _uses(harness: EngineHarness, row: Row, versions: Mapping[str, AdapterVersion]) -> tuple[AdapterUse, ...]:
    """Sorted by version; one that waits for tokens the prompt does not have is left out, as the API does it."""
    uses = []
    for name, weight in row.uses:
        version = versions[name]
        invocation = harness.engine.adapters.model(version).extras.invocation_tokens
        begin = last_begin(row.prompt, invocation) if invocation else 0
        if begin is not None:
            uses.append(AdapterUse(version, weight, begin))
    return tuple(sorted(uses, key=lambda use: use.version))


def _admit(harness: EngineHarness, row: Row, uses: tuple[AdapterUse, ...], plainly: bool) -> None:
    own: dict[str, Any] = {} if row.vocab_size is None or plainly else {"num_token_ids": row.vocab_size}
    request = Request(
        request_id=row.name,
        prompt_token_ids=tuple(i % VOCAB for i in row.prompt) if plainly else row.prompt,
        sampling_params=SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True),
        adapters=uses,
        **own,
    )
    harness.requests[row.name] = request
    harness.engine.add_request(request)


def check_row(world: World, served: Served, row: Row) -> None:
    """Within 1e-5 of the largest logit, greedy-equal, and the adapter matters."""
    tokens = served.tokens(row)
    assert len(tokens) == NUM_TOKENS, row.name
    ids, num_prompt = [*row.prompt, *tokens], len(row.prompt)
    expected = row.oracle.logits(ids, num_prompt)[num_prompt - 1 : -1]  # [NUM_TOKENS, vocab]
    ours = served.logits(row, expected.shape[1])
    scale = float(expected.abs().max())
    error = float((ours - expected).abs().max())
    assert error <= 1e-5 * scale, f"{world.architecture} {row.name}: off by {error / scale:.1e} of the largest logit"
    assert tokens == expected.argmax(-1).tolist(), f"{world.architecture} {row.name}: another greedy token"
    effect = effect_of(world, row, ids, expected)
    assert (effect <= 1e-4) if row.does_nothing else (effect > 1e-4), f"{world.architecture} {row.name}: {effect}"


def effect_of(world: World, row: Row, ids: Sequence[int], expected: Tensor) -> float:
    """How far the oracle is from the base, which takes token 0 for those it does not have."""
    known = [i if i < VOCAB else 0 for i in ids]
    plain = world.rows[0].oracle.logits(known, len(row.prompt))[len(row.prompt) - 1 : -1]
    width = min(plain.shape[1], expected.shape[1])
    return float((plain[:, :width] - expected[:, :width]).abs().max())
