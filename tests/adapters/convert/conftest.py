"""Bases that every test of a conversion may use."""

from pathlib import Path

import pytest

from tests.adapters.convert.peft_twins import save_base


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("bases") / "llama")


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("bases") / "gpt2", "gpt2")
