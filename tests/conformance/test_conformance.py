"""Every cell of the table: served rows are PEFT's, in any order and cut anywhere, refused ones refused by name.

An ordinary run takes every variant on three architectures and six variants on each; LORAMUX_CONFORMANCE=all all.
"""

import os
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

from server.config import ModelConfig
from server.engine.base_model import ModelRefused, load_base_model
from tests.conformance.batch import BASE, NUM_TOKENS, ROOMY, TIGHT, Served, World, check_row, effect_of, serve
from tests.conformance.cells import FULL, NUM_ARCHITECTURES, NUM_EACH, cell, exists, selection
from tests.conformance.models import CONFIGS, REFUSED_BASES, VOCAB, save
from tests.conformance.table import PAGE, WHAT, page
from tests.conformance.variants import SUMS, VARIANTS

EVERYTHING = os.environ.get("LORAMUX_CONFORMANCE") == "all"


@cache
def chosen() -> dict[str, list[str]]:
    return {architecture: exists(architecture) for architecture in CONFIGS} if EVERYTHING else selection()


@dataclass(frozen=True)
class Run:
    world: World
    served: Served


@pytest.fixture(scope="module", params=CONFIGS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    architecture = request.param
    world = World.make(architecture, chosen()[architecture], tmp_path_factory.mktemp(architecture))
    return Run(world, serve(world, ROOMY))


def test_every_row_is_what_peft_gives_alone(run: Run) -> None:
    for row in run.world.rows:
        if all(name not in run.served.refused for name, _ in row.uses):
            check_row(run.world, run.served, row)


def test_the_judges_see_every_adapter_and_say_the_same_twice(run: Run) -> None:
    """Of all rows, served or not: an oracle that is the base would let anything pass."""
    for row in run.world.rows:
        ids = [*row.prompt, 11, 12, 13]
        first = row.oracle.logits(ids, len(row.prompt))
        assert torch.equal(first, row.oracle.logits(ids, len(row.prompt))), row.name
        assert first.isfinite().all()
        effect = effect_of(run.world, row, ids, first[len(row.prompt) - 1 : -1])
        assert (effect == 0) if row.does_nothing else (effect > 1e-4), f"{row.name}: {effect}"


def test_what_is_promised_is_served_and_the_rest_refused_by_its_code(run: Run) -> None:
    """A cell that could be served and is not promised fails, too: take it out of cells.NOT_YET, write the table."""
    wrong = []
    for name in run.world.adapters:
        promised, refusal = cell(run.world.architecture, name), run.served.refused.get(name)
        found = None if refusal is None else refusal.reason
        if found is not promised.code:
            wrong.append(f"{name}: promised {promised.code or 'served'}, found {refusal or 'served'}")
        if refusal is not None:
            assert refusal.tensor or refusal.feature, f"{name}: the refusal names nothing"
            assert len(str(refusal)) < 1200 and str(refusal).isprintable()
    assert wrong == [], f"on {run.world.architecture}"


def test_neither_order_nor_chunks_matter(run: Run) -> None:
    """The same rows backwards, in smaller steps, with fewer at once."""
    again = serve(run.world, TIGHT, rows=run.world.rows[::-1])
    for row in run.world.rows:
        if all(name not in run.served.refused for name, _ in row.uses):
            check_row(run.world, again, row)
            assert again.tokens(row) == run.served.tokens(row)


def test_the_base_row_does_not_feel_the_others(run: Run) -> None:
    """Bit by bit: the same batch, in which every row is the base's. In a model with experts the others' adapters change
    where they are routed, and so what the base row's tokens meet there."""
    plainly = serve(run.world, ROOMY, plainly=True)
    base = run.world.rows[0]
    assert base.name == BASE
    assert torch.equal(run.served.logits(base, VOCAB), plainly.logits(base, VOCAB))
    for row in run.world.rows[1:]:
        if row.name in run.served.harness.requests and not row.does_nothing:
            assert len(plainly.tokens(row)) == NUM_TOKENS
            changed = (
                run.served.harness.logits[row.name][0][: VOCAB - 4] - plainly.harness.logits[row.name][0][: VOCAB - 4]
            )
            assert float(changed.abs().max()) > 1e-4, f"{row.name} does not feel its adapter"


def test_the_selection_covers_what_it_says() -> None:
    picked = selection()
    assert all(len(names) == len(set(names)) for names in picked.values())
    assert all(set(names) <= set(exists(architecture)) for architecture, names in picked.items())
    assert all(len(names) >= NUM_EACH for names in picked.values())
    assert all(picked[architecture] == exists(architecture) for architecture in FULL)
    counts = Counter(name for names in picked.values() for name in names)
    for name in (*VARIANTS, *SUMS):
        possible = sum(cell(architecture, name).absent is None for architecture in CONFIGS)
        assert counts[name] >= min(NUM_ARCHITECTURES, possible) > 0, name


def test_the_page_has_the_tables() -> None:
    """`python -m tests.conformance.table` writes them."""
    assert set(WHAT) == {*VARIANTS, *SUMS}
    assert PAGE.read_text(encoding="utf-8") == page()


@pytest.mark.parametrize("architecture", REFUSED_BASES)
def test_a_base_that_cannot_be_served_exactly_is_refused(architecture: str, tmp_path: Path) -> None:
    with pytest.raises(ModelRefused):
        load_base_model(save(architecture, tmp_path / "base"), architecture, ModelConfig(dtype="float32", device="cpu"))
