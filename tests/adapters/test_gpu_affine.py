"""What is the Triton affine operation's own: buckets refilled, blocks of wide modules, norms of heads."""

import pytest
import torch
from torch import Tensor

from tests.triton_interpreter import DEVICE, require_triton

require_triton()

from adapters.lora_batch import LoRABatch, RowRanges  # noqa: E402
from adapters.ops import AffineTable, gpu_affine, reference_affine  # noqa: E402
from adapters.ops.gpu_affine_batch import AffineCaps, AffineStaging, AffineStep, GPUAffineBatch  # noqa: E402
from tests.adapters.test_affine_ops import RANGES, WIDTHS, batch_of, outputs, table  # noqa: E402

GARBAGE = 0x7FFFFFFF


class Buffer:
    """A bucket as a runner keeps it: one buffer of words, refilled for every step, and one batch over it."""

    def __init__(self, num_rows: int) -> None:
        self.part = AffineStaging()
        self.caps = self.part.bucket(num_rows)
        self.words = self.part.layout(self.caps)
        self.host = torch.full([sum(self.words.values())], GARBAGE, dtype=torch.int32)
        self.device = self.host.to(DEVICE, copy=True)
        self.batch = self.part.from_device(dict(zip(self.words, self._split(self.device), strict=True)), self.caps)

    def _split(self, words: Tensor) -> tuple[Tensor, ...]:
        return words.split(list(self.words.values()))

    def load(self, ranges: list[RowRanges]) -> GPUAffineBatch:
        lora, extras = batch_of([1] * len(ranges), ranges)
        views = {name: part.numpy() for name, part in zip(self.words, self._split(self.host), strict=True)}
        self.part.fill(views, AffineStep(lora, extras.affine_tokens), self.caps)
        self.device.copy_(self.host)
        return self.batch


def test_a_smaller_step_after_a_larger_one_leaves_no_ghost() -> None:
    found, buffer = table(DEVICE), Buffer(16)
    bound = gpu_affine.bind_affine(found, range(len(WIDTHS)), WIDTHS)
    before = outputs(16, torch.float32, DEVICE)
    bound.apply([y.clone() for y in before], buffer.load(RANGES))
    ys = [y.clone() for y in before]
    bound.apply(ys, buffer.load([(), ((0, 0.5),), ()]))
    assert not (buffer.device == GARBAGE).any()
    for y, old in zip(ys, before, strict=True):
        kept = [0, *range(2, 16)]
        assert torch.equal(y[:, kept], old[:, kept]) and not torch.equal(y[:, 1], old[:, 1])


def test_bits_do_not_depend_on_the_bucket() -> None:
    found, before = table(DEVICE), outputs(16, torch.bfloat16, DEVICE)
    bound = gpu_affine.bind_affine(found, range(len(WIDTHS)), WIDTHS)
    lora, extras = batch_of([1] * 9, RANGES)
    in_bucket, exact = [y.clone() for y in before], [y[:, :9].clone() for y in before]
    bound.apply(in_bucket, Buffer(16).load(RANGES))
    bound.apply(exact, gpu_affine.stage_affine(lora, extras.affine_tokens, DEVICE))
    assert all(torch.equal(a[:, :9], b) for a, b in zip(in_bucket, exact, strict=True))


def test_a_step_over_its_bucket_is_refused() -> None:
    with pytest.raises(ValueError, match="larger bucket"):
        Buffer(8).load(RANGES)
    with pytest.raises(ValueError, match="larger bucket"):
        Buffer(3).load([((0, 1.0), (3, 1.0)), ((5, 1.0), (0, 0.5)), ()])


def test_only_tokens_with_vectors_are_staged() -> None:
    """Tokens of a prompt and decode rows, some without, and of each its own entries."""
    lora, extras = batch_of([2, 3, 1, 1], [((0, 1.0),), (), ((7, 1.0),), ((3, 0.5), (7, 2.0))], min_segment=2)
    step = AffineStep(lora, extras.affine_tokens)
    staged = AffineStaging().stage(step, DEVICE)
    assert staged.caps == AffineCaps(num_tokens=7, num_affine=3, num_entries=4)
    assert staged.tokens.tolist()[:3] == [0, 1, 6] and staged.indptr.tolist()[:4] == [0, 1, 2, 4]
    assert staged.entry_starts.tolist()[:4] == [0, 0, 3, 7]
    assert staged.entry_weights.tolist()[:4] == [1.0, 1.0, 0.5, 2.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("widths", "rows"), [((1100, 516), 1), ((32,), 40)], ids=["wide", "heads"])
def test_blocks_of_real_shapes(widths: tuple[int, ...], rows: int, dtype: torch.dtype) -> None:
    """Several blocks of outputs, the last not full; norms of so many heads that a program takes turns."""
    generator = torch.Generator().manual_seed(0)
    tables = [AffineTable(len(widths), 4, device) for device in (DEVICE, torch.device("cpu"))]
    drawn = {site: torch.randn(2, width, generator=generator) for site, width in enumerate(widths)}
    for each in tables:
        each.write(2, {site: vectors.to(each.addresses.device) for site, vectors in drawn.items()})
    lora = LoRABatch.build([1, 1, 2], [((2, 0.5),), (), ((2, -1.5),)], min_segment=2)
    assert lora is not None
    ys = [torch.randn(4, rows, width, generator=generator).to(dtype) for width in widths]
    wanted, got = [y.clone() for y in ys], [y.to(DEVICE) for y in ys]
    _, extras = batch_of([1, 1, 2], [((0, 1.0),), (), ((0, 1.0),)])
    tokens = extras.affine_tokens
    gpu_affine.bind_affine(tables[0], range(len(widths)), widths).apply(
        got, gpu_affine.stage_affine(lora, tokens, DEVICE)
    )
    reference_affine.bind_affine(tables[1], range(len(widths)), widths).apply(
        wanted, reference_affine.stage_affine(lora, tokens)
    )
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=2**-8 if dtype is torch.bfloat16 else 1e-6, atol=1e-6)


def test_groups_too_large_for_a_launch_are_refused() -> None:
    with pytest.raises(ValueError, match="5 modules"):
        gpu_affine.bind_affine(AffineTable(5, 4, DEVICE), range(5), [8] * 5)
