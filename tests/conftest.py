"""Fixtures every test may use, and where Triton runs. Nothing here downloads anything."""

from pathlib import Path

import pytest

import tests.triton_interpreter  # noqa: F401  # before all that imports Triton: PEFT, the base model
from server.default_model import default_model_folder as resolve_default_model
from tests.engine.life_world import Shelf


@pytest.fixture(scope="session")
def default_model_folder() -> Path:
    """SmolLM2-135M-Instruct as a safetensors folder, converted from the installed wheel at the first use."""
    return resolve_default_model()


@pytest.fixture(scope="session")
def life_shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    """A tiny model, six adapters, and what each of them answers alone."""
    return Shelf.build(tmp_path_factory.mktemp("shelf"))
