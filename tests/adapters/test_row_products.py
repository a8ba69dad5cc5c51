"""Rows times a matrix: near float64, and a row's bits its own."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from adapters import ops
from adapters.ops import cpu_product, reference_product
from adapters.ops.thread_team import start_team

IMPLEMENTATIONS = [pytest.param(reference_product, id="reference"), pytest.param(cpu_product, id="cpu")]
SHAPES = [(64, 576), (1030, 64), (257, 96), (256, 32), (49, 96), (400, 40)]  # out, in


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("num_threads", [1, 2])
def test_it_is_the_product(
    implementation: ModuleType, dtype: torch.dtype, shape: tuple[int, int], num_threads: int
) -> None:
    team = start_team(num_threads)
    weight = drawn(*shape, dtype=dtype)
    for num_rows in (1, 3, 8, 11):
        x = drawn(num_rows, shape[1], dtype=dtype, seed=num_rows)
        with team.step():
            got = implementation.product(x, weight)
        want = x.double() @ weight.double().T
        assert got.dtype is torch.float32 and got.shape == want.shape
        rounding = 2.0**-8 * want.abs() if dtype is torch.bfloat16 else 0.0
        assert ((got.double() - want).abs() <= 1e-4 * shape[1] ** 0.5 + rounding).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_s_bits_do_not_depend_on_the_others(shape: tuple[int, int]) -> None:
    weight, x = drawn(*shape, dtype=torch.bfloat16), drawn(19, shape[1], dtype=torch.bfloat16, seed=1)
    together = ops.product(x, weight)
    for rows in ([0], [18], [3, 7], list(range(5, 17))):
        assert torch.equal(ops.product(x[rows], weight), together[rows])


def test_a_weight_that_is_not_dense_is_multiplied_all_the_same() -> None:
    weight, x = drawn(64, 512, dtype=torch.bfloat16).T, drawn(3, 64, dtype=torch.bfloat16, seed=1)
    assert (ops.product(x, weight).double() - x.double() @ weight.double().T).abs().max() < 0.3
