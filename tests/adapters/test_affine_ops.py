"""The affine operation against float64, over dtypes, adapters a token, rows a token and modules a group."""

import importlib
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from adapters import ops
from adapters.extras_batch import ExtrasBatch
from adapters.lora_batch import LoRABatch, RowRanges
from adapters.ops import AffineOps, AffineTable, reference_affine
from adapters.step_features import NO_FEATURES, StepFeature
from tests.triton_interpreter import DEVICE, require_triton

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Form:
    """One implementation; that of Triton where there is one, on the GPU or in its interpreter."""

    name: str
    device: torch.device = CPU

    @property
    def ops(self) -> AffineOps:
        if self.name == "gpu_affine":
            require_triton()
        if self.name == "cpu_affine":
            pytest.importorskip("numba")
        found: AffineOps = importlib.import_module(f"adapters.ops.{self.name}")
        return found

    def stage(self, lora: LoRABatch, extras: ExtrasBatch) -> Any:
        options = {"device": self.device} if self.name == "gpu_affine" else {}
        return self.ops.stage_affine(lora, extras.affine_tokens, **options)


REFERENCE, ON_CPU, ON_GPU = Form("reference_affine"), Form("cpu_affine"), Form("gpu_affine", DEVICE)
FORMS = [pytest.param(form, id=form.name) for form in (REFERENCE, ON_CPU, ON_GPU)]
DTYPES = [torch.float32, torch.bfloat16]
WIDTHS, ROWS, NUM_ROWS = (40, 7, 133), (1, 4, 1), 12
WITH_VECTORS = {0: (0, 1, 2), 3: (1,), 5: (0, 2)}  # first pool row → sites; 7 and 9 have low-rank pairs alone
RANGES: list[RowRanges] = [
    ((0, 1.0),),
    (),
    ((3, 0.7),),
    ((7, 1.0),),
    ((0, 0.5), (5, -1.25)),
    ((3, 1.0), (7, 2.0)),
    ((0, 1.0), (3, 0.25), (5, 1.0)),
    ((5, 1.0),),
    ((9, 1.0),),
]


def table(device: torch.device = CPU) -> AffineTable:
    generator = torch.Generator().manual_seed(0)
    found = AffineTable(len(WIDTHS), NUM_ROWS, device)
    for start, sites in WITH_VECTORS.items():
        found.write(start, {site: torch.randn(2, WIDTHS[site], generator=generator).to(device) for site in sites})
    found.check_integrity()
    return found


def batch_of(counts: list[int], ranges: list[RowRanges], *, min_segment: int = 100) -> tuple[LoRABatch, ExtrasBatch]:
    lora = LoRABatch.build(counts, ranges, min_segment=min_segment)
    assert lora is not None
    features = dict.fromkeys(WITH_VECTORS, StepFeature.AFFINE)
    extras = ExtrasBatch.build(lora, np.arange(0), lambda s: features.get(s, NO_FEATURES), lambda _: None)
    assert extras is not None
    return lora, extras


def outputs(num_tokens: int, dtype: torch.dtype, device: torch.device = CPU) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    shapes = zip(ROWS, WIDTHS, strict=True)
    return [torch.randn(1, num_tokens, rows * width, generator=generator).to(device, dtype) for rows, width in shapes]


def expected(found: AffineTable, y: Tensor, site: int, token_ranges: list[RowRanges]) -> Tensor:
    """In float64, [num_tokens, rows, width]."""
    out = y.double().reshape(len(token_ranges), ROWS[site], WIDTHS[site]).clone()
    for token, ranges in enumerate(token_ranges):
        gain, shift = 1.0, 0.0
        for start, weight in ranges:
            if (site, start) in found.vectors:
                d, c = found.vectors[site, start].cpu().double()
                gain, shift = gain + weight * d, shift + weight * c
        out[token] = out[token] * gain + shift
    return out


def assert_rounded_once(got: Tensor, want: Tensor, size: Tensor) -> None:
    limit = 1e-6 * (1 + size.abs())
    if got.dtype is torch.bfloat16:
        limit = limit + torch.exp2(torch.frexp(want).exponent.double() - 9)
    assert (got.double() - want).abs().le(limit).all()


@pytest.mark.parametrize(("form", "num_threads"), [(REFERENCE, 1), (ON_CPU, 1), (ON_CPU, 2), (ON_GPU, 1)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", [[1] * len(RANGES), [3, 2, 1, 4, 1, 2, 1, 5, 2]], ids=["decode", "prompts"])
def test_it_equals_float64(form: Form, dtype: torch.dtype, counts: list[int], num_threads: int) -> None:
    if form is ON_CPU:
        pytest.importorskip("numba")
        importlib.import_module("adapters.ops.thread_team").start_team(num_threads)
    found, (lora, extras) = table(form.device), batch_of(counts, RANGES, min_segment=2)
    token_ranges = [ranges for count, ranges in zip(counts, RANGES, strict=True) for _ in range(count)]
    ys = outputs(len(token_ranges), dtype, form.device)
    before = [y.clone().cpu() for y in ys]
    form.ops.bind_affine(found, range(len(WIDTHS)), WIDTHS).apply(ys, form.stage(lora, extras))
    for site, (y, old) in enumerate(zip(ys, before, strict=True)):
        got, old = (each.cpu().reshape(len(token_ranges), ROWS[site], WIDTHS[site]) for each in (y, old))
        assert_rounded_once(got, expected(found, old, site, token_ranges), old.double())
        for token, ranges in enumerate(token_ranges):
            has_vectors = any((site, start) in found.vectors for start, _ in ranges)
            assert torch.equal(got[token], old[token]) is not has_vectors


@pytest.mark.parametrize("form", [ON_CPU, ON_GPU], ids=["cpu_affine", "gpu_affine"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_s_bits_do_not_depend_on_the_others(form: Form, dtype: torch.dtype) -> None:
    found = table(form.device)
    bound = form.ops.bind_affine(found, range(len(WIDTHS)), WIDTHS)
    lora, extras = batch_of([1] * len(RANGES), RANGES)
    together = outputs(len(RANGES), dtype, form.device)
    alone = [y.clone() for y in together]
    bound.apply(together, form.stage(lora, extras))
    for token in extras.affine_tokens.tolist():
        one, its = batch_of([1], [RANGES[token]])
        ys = [y[:, token].clone() for y in alone]
        bound.apply(ys, form.stage(one, its))
        assert all(torch.equal(y[0], both[0, token]) for y, both in zip(ys, together, strict=True))


def test_a_recorded_call_serves_another_mix() -> None:
    """What a staged step becomes is what the arguments given before then lead to."""
    found, cpu_affine = table(), ON_CPU.ops
    bound = cpu_affine.bind_affine(found, [0], WIDTHS[:1])
    (first, one), (second, other) = batch_of([1, 1], [((0, 1.0),), ()]), batch_of([1, 1], [((5, 0.5),), ((0, 1.0),)])
    staged = cpu_affine.stage_affine(first, one.affine_tokens)
    staged.become(cpu_affine.stage_affine(second, other.affine_tokens))
    ys, wanted = outputs(2, torch.float32)[:1], outputs(2, torch.float32)[:1]
    bound.apply(ys, staged)
    cpu_affine.bind_affine(found, [0], WIDTHS[:1]).apply(wanted, cpu_affine.stage_affine(second, other.affine_tokens))
    assert torch.equal(ys[0], wanted[0])


@pytest.mark.parametrize("form", FORMS)
def test_tokens_that_are_not_the_batch_s_are_refused(form: Form) -> None:
    found, (lora, extras) = table(form.device), batch_of([1, 1], [((0, 1.0),), ()])
    bound, staged = form.ops.bind_affine(found, [0], WIDTHS[:1]), form.stage(lora, extras)
    for y in (torch.zeros(3, WIDTHS[0]), torch.zeros(2, WIDTHS[0] - 1), torch.zeros(WIDTHS[0], 2).T):
        with pytest.raises(RuntimeError, match="of this forward pass"):
            bound.apply([y.to(form.device)], staged)


@pytest.mark.parametrize("form", [ON_CPU, ON_GPU], ids=["cpu_affine", "gpu_affine"])
def test_a_dtype_that_is_not_served_is_refused(form: Form) -> None:
    found, (lora, extras) = table(form.device), batch_of([1, 1], [((0, 1.0),), ()])
    bound, staged = form.ops.bind_affine(found, [0], WIDTHS[:1]), form.stage(lora, extras)
    with pytest.raises(RuntimeError, match="bfloat16"):
        bound.apply([torch.zeros(2, WIDTHS[0], dtype=torch.float16, device=form.device)], staged)


def test_vectors_that_are_not_aligned_are_refused() -> None:
    found = AffineTable(1, 4, CPU)
    with pytest.raises(AssertionError, match="16 bytes"):
        found.write(0, {0: torch.zeros(9)[1:].view(2, 4)})


def test_what_is_cleared_is_gone() -> None:
    found = table()
    found.clear(0)
    found.write(3, {})
    found.check_integrity()
    assert not found.addresses[:, [0, 3]].any() and found.addresses[:, 5].any()
    found.addresses[0, 9] = 8
    with pytest.raises(AssertionError, match="affine"):
        found.check_integrity()


def test_a_device_without_an_implementation_gets_the_reference() -> None:
    on_cpu: Any = ops.select_affine(CPU)
    assert on_cpu.__name__.rpartition(".")[2] == ("cpu_affine" if find_spec("numba") else "reference_affine")
    on_cuda: Any = ops.select_affine(torch.device("cuda"))
    assert on_cuda.__name__.rpartition(".")[2] == ("gpu_affine" if find_spec("triton") else "reference_affine")
    assert ops.select_affine(torch.device("meta")) is reference_affine


def test_a_step_in_which_nobody_has_features_has_no_extras() -> None:
    lora = LoRABatch.build([1, 1], [((7, 1.0),), ()])
    assert lora is not None
    assert ExtrasBatch.build(lora, np.arange(2), lambda _: NO_FEATURES, lambda _: None) is None


def test_rows_are_told_by_adapter_and_weight() -> None:
    ranges: list[RowRanges] = [((0, 1.0),), ((0, 1.0), (3, 0.5)), ((5, 1.0),), ((0, 1.0), (5, 1.0))]
    lora = LoRABatch.build([1, 2, 1, 1], ranges, min_segment=9)
    assert lora is not None
    features = {0: StepFeature.HEAD | StepFeature.EMBEDDING, 3: StepFeature.EMBEDDING, 5: StepFeature.WIDE_LOGITS}
    got = ExtrasBatch.build(
        lora, np.array([4, 2]), features.__getitem__, {0: None, 3: None, 5: 70}.__getitem__, ((1, 99),)
    )
    assert got is not None and got.num_columns == 70 and got.foreign_ids == ((1, 99),)
    assert got.features == features[0] | features[5]
    assert len(got.affine_tokens) == 0
    tokens = {(rows.start, rows.weight, rows.is_alone): rows.rows.tolist() for rows in got.tokens}
    assert tokens == {(0, 1.0, True): [0, 4], (0, 1.0, False): [1, 2], (3, 0.5, False): [1, 2]}
    kept = {(rows.start, rows.weight, rows.is_alone): rows.rows.tolist() for rows in got.kept}
    assert kept == {(0, 1.0, True): [0, 1]}


def test_a_token_s_adapters_come_in_its_own_order_whoever_came_before() -> None:
    ranges: list[RowRanges] = [((5, 0.5), (0, 1.0)), ((0, 1.0), (3, 1.0), (5, 0.5)), ((0, 1.0), (0, 1.0))]
    lora = LoRABatch.build([1, 1, 1], ranges, min_segment=9)
    assert lora is not None
    got = ExtrasBatch.build(lora, np.arange(0), lambda _: StepFeature.EXPERTS, lambda _: None)
    assert got is not None
    for token, entries in enumerate(ranges):
        assert tuple((part.start, part.weight) for part in got.tokens for row in part.rows if row == token) == entries
    assert all(len(set(part.rows.tolist())) == len(part.rows) for part in got.tokens)
