"""The GPU script from end to end at toy size, its kernels in Triton's interpreter."""

import json
from pathlib import Path

import pytest
import torch

from tests.triton_interpreter import require_triton

require_triton()

from loadtest.__main__ import main  # noqa: E402
from loadtest.gpu.measure import MAX_ERROR  # noqa: E402


def test_every_part_runs_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["kernels", "steps", "serving", "profile", "--tiny", "--device", "cpu", "--out", str(tmp_path)]
    assert main(["gpu", *arguments]) == 0
    found = json.loads((tmp_path / "gpu-kernels-steps-serving-profile.json").read_text())
    assert {row["op"] for row in found["kernels"]} == {"lora qkv", "affine qkv", "attention"}
    assert all(row["floor_us"] > 0 and row["error"] < MAX_ERROR for row in found["kernels"])
    (gains,) = (row for row in found["steps"] if row["step"] == "decode, DoRA in one row")
    assert gains["rows"] == gains["adapters"] == 2 and gains["over_plain"] > 0
    decode = {row["adapters"]: row for row in found["steps"] if row["step"] == "decode"}
    assert set(decode) == {0, 1, 2} and decode[0]["eta"] == 1.0 and decode[0]["phi"] == 1.0
    assert 0 < decode[2]["phi"] < decode[1]["phi"] < 1
    assert [row["adapters"] for row in found["steps"] if row["step"] == "prefill"] == [1]
    assert {row["adapters"] for row in found["serving"]} == {0, 1, 2}
    assert "Self CPU" in found["profile of a decode step, tiny"]
    printed = capsys.readouterr().out
    assert "eta_over_phi" in printed and "rho" in printed and found["environment"]["packages"]["torch"] in printed


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:

    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert main(["gpu", "steps"]) == 1
    assert "no CUDA device" in capsys.readouterr().err


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu", "everything"]) == 1
    assert "parts are check, kernels" in capsys.readouterr().err
