"""Figures with the machine, the versions and the command that made them: JSON, and tables to read."""

import json
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "triton", "transformers", "numpy")


def environment() -> dict[str, Any]:
    is_cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if is_cuda else platform.processor() or platform.machine(),
        "cuda": torch.version.cuda if is_cuda else None,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "command": shlex.join(["python", "-m", "loadtest", *sys.argv[1:]]),
    }


def write(folder: Path, name: str, report: dict[str, Any]) -> str:
    """NAME.json and NAME.md in `folder`; returns the text of the second."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(report, indent=2, default=str) + "\n")
    text = markdown(report)
    (folder / f"{name}.md").write_text(text)
    return text


def markdown(report: dict[str, Any]) -> str:
    lines = ["# On a GPU", ""]
    for key, value in report["environment"].items():
        lines.append(f"- {key}: {value}")
    for name, value in report.items():
        if isinstance(value, list) and value:
            lines += ["", f"## {name}", "", *table(value)]
        elif isinstance(value, str):
            lines += ["", f"## {name}", "", "```", value, "```"]
    lines += ["", *(f"- {name}: {value}" for name, value in report.items() if isinstance(value, float | int))]
    return "\n".join(lines) + "\n"


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return lines + ["| " + " | ".join(_cell(row.get(name)) for name in names) + " |" for row in rows]


def _cell(value: Any) -> str:
    if value is None or value != value:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"
