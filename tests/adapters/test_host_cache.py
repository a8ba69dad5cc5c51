"""The byte budget of loaded adapters: exact at the limit, nothing kept when refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.adapter_ref import AdapterVersion
from adapters.errors import AdapterCapacity
from adapters.host_cache import HostCache
from adapters.lora_model import LoRAModel, LoRAWeights


def model_of(version: str, lora_rank: int = 1) -> LoRAModel:
    """lora_rank · 64 bytes."""
    weights = LoRAWeights(torch.zeros(lora_rank, 8), torch.zeros(lora_rank, 8))
    return LoRAModel(AdapterVersion(version), {"m": weights})


def test_a_model_is_kept_and_given_back() -> None:
    cache = HostCache(max_bytes=64)
    model = model_of("a")
    cache.put(model)
    assert cache.get(model.version) is model and model.version in cache
    assert (cache.num_bytes, len(cache), list(cache)) == (64, 1, ["a"])
    assert cache.drop(model.version) and not cache.drop(model.version)
    assert (cache.num_bytes, cache.get(model.version)) == (0, None)


def test_the_same_version_again_costs_nothing() -> None:
    cache = HostCache(max_bytes=64, max_adapters=1)
    cache.put(model_of("a"))
    cache.put(model_of("a"))
    assert (cache.num_bytes, len(cache)) == (64, 1)


def test_one_byte_over_is_refused_and_names_limit_and_flag() -> None:
    cache = HostCache(max_bytes=127)
    cache.put(model_of("a"))
    with pytest.raises(AdapterCapacity, match=r"takes 64 bytes.* 63 of cpu_lora_memory=127.*--cpu-lora-memory"):
        cache.put(model_of("b"))
    assert list(cache) == ["a"]


def test_one_adapter_over_is_refused() -> None:
    cache = HostCache(max_bytes=10_000, max_adapters=2)
    cache.put(model_of("a"))
    cache.put(model_of("b"))
    with pytest.raises(AdapterCapacity, match=r"2 adapters are loaded.*--max-cpu-loras"):
        cache.put(model_of("c"))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["put", "drop"]), st.integers(0, 5)), max_size=30))
def test_integrity_holds_through_any_sequence(steps: list[tuple[str, int]]) -> None:
    cache = HostCache(max_bytes=64 * 7, max_adapters=3)
    expected: dict[str, int] = {}
    for action, number in steps:
        name, size = str(number), 64 * (number + 1)
        if action == "drop":
            assert cache.drop(AdapterVersion(name)) == (expected.pop(name, None) is not None)
        else:
            fits = name in expected or (len(expected) < 3 and sum(expected.values()) + size <= 64 * 7)
            try:
                cache.put(model_of(name, number + 1))
                assert fits
                expected[name] = size
            except AdapterCapacity:
                assert not fits
        cache.check_integrity()
        assert cache.num_bytes == sum(expected.values())
