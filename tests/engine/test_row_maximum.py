"""The largest element of bfloat16 rows is torch's, to the first of equals, for every value there is."""

import pytest
import torch
from torch import Tensor

from server.engine.row_maximum import NOT_FINITE, largest_ids, serves


def check(rows: Tensor) -> None:
    peak, ids = rows.float().max(-1)
    assert largest_ids(rows) == torch.where(peak.isfinite(), ids, NOT_FINITE).tolist()


@pytest.mark.parametrize("width", [1, 31, 32, 33, 1000, 49152])
def test_random_rows(width: int) -> None:
    check(torch.randn(7, width, generator=torch.Generator().manual_seed(width)).bfloat16())


def test_the_first_of_equals() -> None:
    check(torch.full((3, 100), -2.5).bfloat16())
    rows = torch.randn(20, 500, generator=torch.Generator().manual_seed(0)).mul(2).round().bfloat16()
    check(rows)


def test_both_zeros_are_equal() -> None:
    check(torch.tensor([[-1.0, -0.0, 0.0], [-1.0, 0.0, -0.0], [-0.0, -0.0, -3.0]]).bfloat16())


def test_every_pair_of_kinds_of_numbers() -> None:
    bits = torch.cat([torch.arange(0, 1 << 16, 97), torch.tensor([0x7F80, 0xFF80, 0x7FC0, 0xFFC0, 0x7F81, 0xFFFF])])
    values = bits.to(torch.int32).to(torch.uint16).view(torch.bfloat16)
    left, right = torch.meshgrid(values, values, indexing="ij")
    check(torch.stack([left.flatten(), right.flatten()], -1))


def test_infinite_and_undefined_rows_have_none() -> None:
    rows = torch.zeros(4, 70).bfloat16()
    rows[0, 5], rows[1, 69], rows[2] = torch.nan, torch.inf, -torch.inf
    assert largest_ids(rows) == [NOT_FINITE, NOT_FINITE, NOT_FINITE, 0]


def test_rows_cut_out_of_wider_ones() -> None:
    wide = torch.randn(5, 90, generator=torch.Generator().manual_seed(1)).bfloat16()
    check(wide[1:4, 7:40])
    assert not serves(wide.T) and not serves(wide.float()) and not serves(wide[0])
