"""How the CPU's threads are shared out between torch and our kernels."""

from collections.abc import Iterator

import pytest
import torch

from adapters.ops.thread_team import current_team, start_team
from server.engine import cpu_model


@pytest.fixture(autouse=True)
def keep_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: {0, 1, 2})
    torch_threads, team_threads = torch.get_num_threads(), current_team().num_threads
    yield
    torch.set_num_threads(torch_threads)
    start_team(team_threads)


@pytest.mark.parametrize(("wanted", "environment", "expected"), [(None, None, 3), (2, "1", 2), (None, "2,1", 2)])
def test_our_products_leave_torch_one_thread(wanted: int | None, environment: str | None, expected: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if environment is not None:
            patch.setenv("OMP_NUM_THREADS", environment)
        team = cpu_model._share_out_threads(wanted, own_product=True)
    assert (team.num_threads, torch.get_num_threads()) == (expected, 1)


@pytest.mark.parametrize(("wanted", "expected"), [(None, 2), (3, 3)])
def test_torch_s_products_leave_our_team_one_thread_and_connections_a_core(wanted: int | None, expected: int) -> None:
    team = cpu_model._share_out_threads(wanted, own_product=False)
    assert (team.num_threads, torch.get_num_threads()) == (1, expected)


def test_a_number_that_is_none_is_not_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert cpu_model._share_out_threads(None, own_product=True).num_threads == 3
