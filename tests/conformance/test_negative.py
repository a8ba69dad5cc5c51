"""No folder with one thing wrong is served, and each refusal has its documented code, names what is wrong, and is fast.

A cell whose variant is not served yet waits (cells.NOT_YET); the cells that wait are counted, not run.
"""

import shutil
import time
from pathlib import Path

import pytest

from adapters.errors import AdapterRefused
from tests.conformance.batch import ROOMY
from tests.conformance.cells import cell
from tests.conformance.models import save
from tests.conformance.mutations import Folder, Negative
from tests.conformance.negatives import NEGATIVES
from tests.conformance.traits import traits
from tests.conformance.variants import VARIANTS
from tests.equivalence.harness import EngineHarness

RUNNING = [each for each in NEGATIVES if all(cell(each.architecture, name).is_served for name in each.needs)]
MAX_SECONDS = 0.05
PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> EngineHarness:
    return EngineHarness.open(save("llama", tmp_path_factory.mktemp("negative") / "llama"), "float32", ROOMY)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """variant → its folder as PEFT wrote it."""
    place = tmp_path_factory.mktemp("good")
    names = {each.source for each in RUNNING}
    return {name: VARIANTS[name].make(traits("llama"), place / name).folder for name in sorted(names)}


def test_there_are_enough_and_no_two_alike() -> None:
    assert len({each.name for each in NEGATIVES}) == len(NEGATIVES)
    assert len(RUNNING) >= 120


def test_the_good_folders_are_good(harness: EngineHarness, good: dict[str, Path], tmp_path: Path) -> None:
    """Also when taken apart and written again, so that what is refused below is refused for the mutation."""
    for name, folder in good.items():
        copy = shutil.copytree(folder, tmp_path / name)
        Folder.read(copy).write()
        assert harness.load(copy)


@pytest.mark.parametrize("negative", RUNNING, ids=lambda each: each.name)
def test_one_thing_wrong_is_refused_by_name(
    negative: Negative, harness: EngineHarness, good: dict[str, Path], tmp_path: Path
) -> None:
    folder = Folder.read(shutil.copytree(good[negative.source], tmp_path / "folder"))
    named = negative.mutate(folder)
    folder.write()
    loaded = len(harness.engine.adapters.active_versions)
    took = []
    for _ in range(3):  # the fastest of three: the machine may be busy
        begin = time.perf_counter()
        with pytest.raises(AdapterRefused) as caught:
            harness.load(folder.path)
        took.append(time.perf_counter() - begin)
    refusal = caught.value
    assert refusal.reason is negative.code, str(refusal)
    assert named in str(refusal), f"{named} is not in: {refusal}"
    assert refusal.tensor or refusal.feature or named, "the refusal names nothing"
    assert refusal.fix and len(str(refusal)) < 1200 and str(refusal).isprintable()
    assert min(took) <= MAX_SECONDS
    assert len(harness.engine.adapters.active_versions) == loaded


def test_every_code_is_documented() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert {each.code for each in NEGATIVES if f"| `{each.code}` |" not in page} == set()
