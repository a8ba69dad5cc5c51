"""The one-call copy of an adapter against the reference, and what it leaves alone."""

import pytest
import torch

from adapters.ops import RowTarget, RowWriter, cpu, reference
from adapters.ops.thread_team import start_team

NUM_ROWS = 12


def pools(dtype: torch.dtype) -> list[torch.Tensor]:
    """Two planes of one A pool and a B pool, all of -1."""
    a_pool = torch.full((2, NUM_ROWS, 7), -1.0, dtype=dtype)
    return [*a_pool.unbind(), torch.full((NUM_ROWS, 3), -1.0, dtype=dtype)]


def written(make: type[cpu.CPURowWriter] | type[reference.ReferenceRowWriter], pool_dtype: torch.dtype) -> torch.Tensor:
    """All pools one after the other, after adapters at rows 0 and 5 of the same layout."""
    places = zip(pools(pool_dtype), (0, 40, 20), (2, 4, 3), strict=True)
    targets = [RowTarget(pool, begin, rank) for pool, begin, rank in places]
    writer: RowWriter = make(targets)
    memory = torch.arange(200.0).to(torch.bfloat16)
    writer.write(memory[:70], 0)
    writer.write(memory[100:170], 5)
    return torch.cat([target.pool.flatten() for target in targets])


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("pool_dtype", [torch.bfloat16, torch.float32], ids=["copied", "converted"])
def test_the_kernel_writes_what_the_reference_writes(pool_dtype: torch.dtype, num_threads: int) -> None:
    start_team(num_threads)
    try:
        got = written(cpu.CPURowWriter, pool_dtype)
    finally:
        start_team(1)
    assert torch.equal(got, written(reference.ReferenceRowWriter, pool_dtype))
    assert int((got == -1).sum()) == sum((NUM_ROWS - 2 * rank) * out for rank, out in ((2, 7), (4, 7), (3, 3)))


def test_nothing_to_write_is_nothing_written() -> None:
    cpu.row_writer([]).write(torch.zeros(4), 0)
