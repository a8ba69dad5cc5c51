"""LFU-DA by itself: its keys, and its hits beside LRU's on scans, on zipf streams, and when what is popular changes."""

import random
from collections import OrderedDict
from collections.abc import Sequence

import pytest

from server.lifecycle.lfu_with_ageing import LFUWithAgeing


def hit_rate(stream: Sequence[int], room: int, policy: LFUWithAgeing[int]) -> float:
    num_hits = 0
    for item in stream:
        if item in set(policy):
            num_hits += 1
        else:
            if len(policy) == room:
                policy.evict(min(policy, key=policy.worth))
            policy.add(item)
        policy.use(item)
        policy.check_integrity()
    return num_hits / len(stream)


def lru_hit_rate(stream: Sequence[int], room: int) -> float:
    num_hits = 0
    kept: OrderedDict[int, None] = OrderedDict()
    for item in stream:
        if item in kept:
            num_hits += 1
            kept.move_to_end(item)
            continue
        if len(kept) == room:
            kept.popitem(last=False)
        kept[item] = None
    return num_hits / len(stream)


def zipf(
    num_items: int, length: int, seed: int, *, exponent: float = 1.0, change_every: int | None = None
) -> list[int]:
    """Draws of `num_items`; every `change_every` draws others become popular."""
    source = random.Random(seed)
    weights = [1 / (place + 1) ** exponent for place in range(num_items)]
    stream: list[int] = []
    while len(stream) < length:
        items = source.sample(range(num_items), num_items)
        stream += source.choices(items, weights, k=change_every or length)
    return stream[:length]


def test_keys_are_age_and_uses() -> None:
    policy: LFUWithAgeing[str] = LFUWithAgeing()
    policy.add("a")
    policy.use("a")
    policy.use("a")
    policy.add("b")
    policy.use("b")
    assert (policy.worth("a")[0], policy.worth("b")[0]) == (2, 1)
    policy.evict("b")
    assert policy.age == 1
    policy.add("c")
    policy.use("c")
    assert policy.worth("c")[0] == 2
    policy.use("a")
    assert policy.worth("a")[0] == 4
    policy.forget("a")
    assert policy.age == 1, "what nobody wants says nothing of the others"


def test_age_never_falls() -> None:
    """One worth more may go first, because the one worth less is in use."""
    policy: LFUWithAgeing[str] = LFUWithAgeing()
    for item, uses in (("a", 5), ("b", 1)):
        policy.add(item)
        for _ in range(uses):
            policy.use(item)
    policy.evict("a")
    policy.evict("b")
    assert policy.age == 5


def test_what_was_popular_once_goes_at_last() -> None:
    policy: LFUWithAgeing[int] = LFUWithAgeing()
    for item in (0, 1, 2):
        policy.add(item)
    for _ in range(100_000):
        policy.use(0)
    hit_rate(range(3, 100), 3, policy)
    assert 0 not in set(policy)


@pytest.mark.parametrize("room", [4, 32])
def test_a_scan_of_one_more_than_fits_still_hits(room: int) -> None:
    stream = [step % (room + 1) for step in range(40 * room)]
    assert lru_hit_rate(stream, room) == 0
    assert hit_rate(stream, room, LFUWithAgeing()) > 0.5


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("num_items", "margin"), [(12, 0.05), (64, 0.03)])
def test_zipf_with_room_for_half_hits_better_than_lru(num_items: int, margin: float, seed: int) -> None:
    stream = zipf(num_items, 10_000, seed)
    room = num_items // 2
    assert hit_rate(stream, room, LFUWithAgeing()) > lru_hit_rate(stream, room) + margin


@pytest.mark.parametrize("seed", range(3))
def test_a_change_of_what_is_popular_is_followed(seed: int) -> None:
    stream = zipf(64, 10_000, seed, change_every=1_000)
    limited = hit_rate(stream, 32, LFUWithAgeing())
    assert limited > hit_rate(stream, 32, LFUWithAgeing(max_uses=1 << 30)) + 0.02
    assert limited > lru_hit_rate(stream, 32) - 0.03
