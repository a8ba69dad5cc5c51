"""The house rules that a machine can check: names, sizes, opening docstrings, and who may import whom."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("adapters", "server", "loadtest")
BANNED_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "base", "core"}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 300, 50

LONG_FILES: dict[str, str] = {"adapters/samples/sql_task.py": "two thirds are word lists and templates of one task"}
"""File over the budget → why it is not split."""

LONG_FUNCTIONS: dict[str, str] = {}
"""file:function over the budget → why it is not split."""


def _sources(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def _functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(_tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_no_file_is_named_after_nothing() -> None:
    assert [_name(path) for path in _sources(*PACKAGES, "tests") if path.stem in BANNED_NAMES] == []


def test_every_module_says_what_it_is() -> None:
    silent = [
        _name(path)
        for path in _sources(*PACKAGES, "tests")
        if _tree(path).body and ast.get_docstring(_tree(path)) is None
    ]
    assert silent == []


def test_files_stay_within_their_budget() -> None:
    long = {_name(path): path.read_text().count("\n") for path in _sources(*PACKAGES)}
    assert {name: lines for name, lines in long.items() if lines > MAX_FILE_LINES and name not in LONG_FILES} == {}
    assert {name for name in LONG_FILES if long.get(name, 0) <= MAX_FILE_LINES} == set(), "no exception needed any more"


def test_functions_stay_within_their_budget() -> None:
    long = {
        f"{_name(path)}:{function.name}"
        for path in _sources(*PACKAGES)
        for function in _functions(path)
        if (function.end_lineno or 0) - function.lineno + 1 > MAX_FUNCTION_LINES
    }
    assert long == set(LONG_FUNCTIONS)


def test_no_import_stands_inside_a_function() -> None:
    found = [
        f"{_name(path)}:{node.lineno}"
        for path in _sources(*PACKAGES)
        for function in _functions(path)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert found == []


def test_the_scheduler_needs_no_torch() -> None:
    """Bookkeeping is integers."""
    modules = "server.engine.scheduler, server.engine.block_manager, adapters.registry, adapters.row_range_pool"
    _run_without(["torch"], f"import {modules}")


def test_the_server_has_no_conversions_in_it() -> None:
    _run_without(["adapters.convert"], "import server.serve, server.cli_serve, server.cli_check, adapters.checkpoint")


def test_the_load_test_over_http_needs_no_torch_and_that_of_a_gpu_no_http() -> None:
    _run_without(["torch", "numba", "triton"], "from loadtest.commands import main")
    show_help = "from loadtest.__main__ import main\ntry: main(['gpu', '--help'])\nexcept SystemExit: pass"
    _run_without(["aiohttp", "matplotlib", "torch"], show_help)


@pytest.mark.parametrize("absent", [["numba"], ["triton"], ["numba", "triton"]], ids=" ".join)
def test_the_engine_imports_without_the_compilers_of_other_devices(absent: list[str]) -> None:
    """A GPU machine need not have numba, nor a CPU machine Triton; without either the reference serves."""
    modules = ["server.serve", "server.engine.engine", "server.engine.base_model", "loadtest.__main__"]
    if find_spec("triton") and "triton" not in absent:
        modules += ["loadtest.gpu.measure", "adapters.ops.gpu", "server.engine.attention.gpu"]
        modules += ["tests.gpu.test_engine_on_gpu", "tests.adapters.test_gpu_lora", "tests.engine.test_gpu_attention"]
    _run_without(absent, f"import {', '.join(modules)}\n{_SELECT}")


_SELECT = """
import torch
from adapters import ops
from server.engine.attention import reference, select_backend
for device, compiler in ("cpu", "numba"), ("cuda", "triton"):
    if sys.modules.get(compiler, 0) is None:
        assert ops.select(torch.device(device)) is ops.reference, f"the LoRA operation for {device}"
        assert select_backend(torch.device(device)) is reference.attend, f"the attention for {device}"
"""


def _run_without(absent: list[str], code: str) -> None:
    """Run `code` in an interpreter where the packages `absent` cannot be found."""
    code = f"import sys; sys.modules.update(dict.fromkeys({absent}))\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_module_of_the_server_has_a_layer() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    listed = set(re.findall(r"[\w.]+", " ".join(contracts[0]["layers"])))
    modules = {f"server.{path.stem}" for path in (ROOT / "server").glob("*.py") if path.stem != "__init__"}
    assert modules - listed == set()


def test_imports_run_one_way() -> None:
    """The contracts in pyproject.toml, kept by import-linter."""
    pytest.importorskip("importlinter")
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
