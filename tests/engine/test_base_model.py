"""Loading a base model: what a folder's weights do not decide."""

from pathlib import Path

import pytest
import torch

from server.config import ModelConfig
from server.engine.base_model import BaseModel, load_base_model
from tests.equivalence.architectures import save


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("models") / "llama")


def _dummy(folder: Path, *, seed: int = 0, device: str = "cpu") -> BaseModel:
    return load_base_model(folder, "llama", ModelConfig(load_format="dummy", seed=seed, device=device))


def test_dummy_weights_are_their_seed_s_and_not_the_folder_s(llama: Path) -> None:
    drawn = [next(_dummy(llama, seed=seed).model.parameters()) for seed in (0, 0, 1)]
    stored = next(load_base_model(llama, "llama", ModelConfig(device="cpu")).model.parameters())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], stored)


def test_dummy_weights_are_never_drawn_elsewhere_than_on_the_device(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device, which has no memory to fill; a model that had to be moved there would have filled some."""
    moved: list[torch.device] = []
    to = torch.nn.Module.to

    def recording(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
        moved.extend(each.device for each in (*module.parameters(), *module.buffers()) if each.device != device)
        return to(module, device)

    monkeypatch.setattr(torch.nn.Module, "to", recording)
    model = _dummy(llama, device="meta").model
    assert moved == []
    assert {each.device.type for each in (*model.parameters(), *model.buffers())} == {"meta"}
