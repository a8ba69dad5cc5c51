"""A short churn against a whole server in this process; then with faults planted, which it must see.

`make churn` is the same for 2×10⁵ tokens on the default model. What only this one can do: ask engine and adapters for
their integrity when all is over, and break them.
"""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loadtest.churn import ChurnResult, ChurnSettings, churn
from loadtest.churn_adapters import linear_shapes, pool_bytes, write_sources
from loadtest.churn_operator import ABORT, DELETE, LOAD, PRESSURE, REPLACE
from server.config import MIB, CacheConfig, EngineConfig, HTTPConfig, LoRALimits, ModelConfig, ServerConfig
from tests.end_to_end.in_process import InProcessServer, free_port, in_process, save_tiny_model
from tests.faults import plants

BASE = "tiny"
HOST_ROOM = 6
KINDS = (LOAD, REPLACE, DELETE, ABORT, PRESSURE)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("churn") / "model")


@pytest.fixture(scope="module")
def sources(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_sources(tmp_path_factory.mktemp("sources"), model, 14)


@pytest.fixture
def server(model: Path) -> Iterator[InProcessServer]:
    """Room for four adapters on the device and six in host memory, KV for everybody."""
    config = ServerConfig(
        engine=EngineConfig(
            model=ModelConfig(model=str(model), dtype="float32", device="cpu"),
            cache=CacheConfig(kv_cache_memory=16 * MIB),
            lora=LoRALimits(lora_memory=pool_bytes(model, 4, bytes_per_value=4), max_cpu_loras=HOST_ROOM),
        ),
        http=HTTPConfig(port=free_port()),
        served_model_names=(BASE,),
    )
    with in_process(config) as running:
        yield running


def run(server: InProcessServer, sources: list[Path], num_tokens: int) -> ChurnResult:
    settings = ChurnSettings(
        num_tokens=num_tokens,
        num_sources=14,
        num_prompts=3,
        min_tokens=8,
        max_tokens=24,
        interval=0.01,
        kinds=KINDS,
        host_room=HOST_ROOM,
    )
    return asyncio.run(churn(server.url, BASE, sources, settings))


def test_nobody_gets_another_adapter_s_tokens_and_nothing_is_lost(server: InProcessServer, sources: list[Path]) -> None:
    result = run(server, sources, 3000)
    print(result)
    assert result.is_clean, str(result)
    assert result.verdict.tokens >= 3000
    server.check_integrity()


@pytest.mark.parametrize(
    "plant",
    [plants.prefix_cache_without_adapters, plants.one_adapter_for_the_batch, plants.memoised_row_ranges],
)
def test_the_churn_sees_wrong_tokens(
    server: InProcessServer, sources: list[Path], plant: Callable[[pytest.MonkeyPatch], None]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        result = run(server, sources, 700)
    assert result.verdict.wrong_tokens > 0 and not result.is_clean, str(result)


def test_shapes_are_read_from_the_config(model: Path, server: InProcessServer) -> None:
    base = server.context.engine.info.base  # type: ignore[attr-defined]
    assert linear_shapes(model) == {name: (s.in_features, s.out_features) for name, s in base.linears.items()}
