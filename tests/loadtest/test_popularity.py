"""Each popularity sends what its name says, and the shares say what was sent."""

import random
from collections import Counter

import pytest

from loadtest.popularity import POPULARITIES, Shares, parse_popularity
from loadtest.workload import Workload


def _counts(popularity: str, *, models: int = 20, requests: int = 20_000, seed: int = 0) -> Counter[int]:
    return Counter(parse_popularity(popularity)(requests, models, random.Random(seed)))


def test_identical_asks_for_one() -> None:
    assert _counts("identical") == {0: 20_000}


def test_uniform_asks_for_all_alike() -> None:
    assert all(count == pytest.approx(1000, rel=0.15) for count in _counts("uniform").values())


@pytest.mark.parametrize("exponent", [1.0, 1.5])
def test_zipf_falls_as_its_exponent_says(exponent: float) -> None:
    """P(rank k) = k^-s / sum of j^-s over the models there are; the fourth has 4^-s of the first's share."""
    counts = _counts(f"zipf:{exponent}")
    first = 20_000 / sum((rank + 1) ** -exponent for rank in range(20))
    assert counts[0] == pytest.approx(first, rel=0.03)
    assert counts[3] == pytest.approx(first / 4**exponent, rel=0.1)


def test_zipf_without_exponent_is_one() -> None:
    assert _counts("zipf") == _counts("zipf:1") == _counts("zipf:1.0") != _counts("zipf:1.5")


def test_power_of_one_is_uniform_and_below_one_prefers_the_first() -> None:
    """P(index < k) = (k / models)^alpha, as the index is models * u^(1/alpha)."""
    assert all(count == pytest.approx(1000, rel=0.15) for count in _counts("power:1").values())
    for alpha in (0.3, 2.0):
        counts = _counts(f"power:{alpha}")
        lower_half = sum(counts[index] for index in range(10)) / 20_000
        assert lower_half == pytest.approx(0.5**alpha, abs=0.02)


def test_distinct_gives_every_request_its_own() -> None:
    workload = Workload(models=tuple(f"a{i}" for i in range(40)), num_requests=32, popularity="distinct")
    assert set(workload.asked().values()) == {1}
    with pytest.raises(ValueError, match="41 requests have 40 models"):
        Workload(models=tuple(f"a{i}" for i in range(40)), num_requests=41, popularity="distinct")


@pytest.mark.parametrize("popularity", ["uniform", "zipf:1.5", "power:0.3", "distinct"])
def test_seed_decides(popularity: str) -> None:
    sample = parse_popularity(popularity)
    first, again, other = (sample(30, 50, random.Random(seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert all(0 <= index < 50 for index in first)


@pytest.mark.parametrize("wrong", ["viral", "zipf:", "zipf:x", "zipf:0", "power:-1", "uniform:2", "zipf:nan", ""])
def test_what_is_no_popularity_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="popularity"):
        parse_popularity(wrong)


def test_every_name_offered_can_be_chosen() -> None:
    for name in POPULARITIES:
        assert parse_popularity(name.partition("[")[0])


def test_shares_by_hand() -> None:
    """Six requests to a, two to b, one each to twelve others: 20 in all; the ten most asked have 6 + 2 + 8 of them."""
    shares = Shares.of(["a"] * 6 + ["b"] * 2 + [f"c{i}" for i in range(12)])
    assert shares == Shares(14, 0.3, 0.8)
    assert str(shares) == "14 models asked, top-1 share 30.0%, top-10 share 80.0%"
