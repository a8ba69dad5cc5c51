"""Fixtures every test may use. Nothing here downloads anything."""

from pathlib import Path

import pytest

from server.default_model import default_model_folder as resolve_default_model


@pytest.fixture(scope="session")
def default_model_folder() -> Path:
    """SmolLM2-135M-Instruct as a safetensors folder, converted from the installed wheel at the first use."""
    return resolve_default_model()
