"""How far the written adapter is from its source: read back from disk, multiplied out, compared in float64.

The source's side comes from `SourceDelta`, which the converters make from the source by another way than what they
write. Rows of ΔW are compared in pieces.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from adapters.adapter_folder import WEIGHTS_NAME
from adapters.convert.conversion import Conversion, Progress, SourceDelta, no_progress
from adapters.convert.lora_pairs import sort_pairs
from adapters.convert.peft_pickle import deltas_of
from adapters.convert.scale_rule import ScaleRule
from adapters.convert.stored_tensors import read_file
from adapters.lora_config import CONFIG_NAME
from adapters.untrusted_json import parse_object

_AT_ONCE = 1 << 20  # elements of a ΔW that are compared together: 8 MiB in float64


@dataclass(frozen=True, slots=True)
class ModuleError:
    """Of ΔW written − ΔW of the source: the largest element, the mean of all, and the ratio of Frobenius norms."""

    max: float
    mean: float
    relative: float
    norm: float  # ‖ΔW of the source‖


@dataclass(frozen=True, slots=True)
class WrittenErrors:
    """By module, and by name the largest difference of tensors that were only copied."""

    modules: Mapping[str, ModuleError]
    kept: Mapping[str, float]

    @property
    def worst_module(self) -> str | None:
        return max(self.modules, key=lambda module: self.modules[module].relative, default=None)

    def to_dict(self) -> dict[str, object]:
        errors = list(self.modules.values())
        worst = self.worst_module
        return {
            "num_modules": len(errors),
            "max": max((error.max for error in errors), default=0.0),
            "mean": sum(error.mean for error in errors) / max(len(errors), 1),
            "worst_module": worst,
            "worst_relative": self.modules[worst].relative if worst else 0.0,
            "num_kept_tensors": len(self.kept),
            "kept_max": max(self.kept.values(), default=0.0),
            "by_module": {module: asdict(error) for module, error in self.modules.items()},
        }


@torch.no_grad()
def compare_written(folder: Path, conversion: Conversion, progress: Progress = no_progress) -> WrittenErrors:
    """What the adapter in `folder` adds against what the source adds. A module in one only is a bug, so it raises."""
    config = parse_object((folder / CONFIG_NAME).read_bytes(), what=CONFIG_NAME)
    tensors = read_file(folder / WEIGHTS_NAME)
    written = deltas_of(sort_pairs(tensors), ScaleRule.of(config)) if conversion.deltas else {}
    if written.keys() != conversion.deltas.keys():
        raise AssertionError(f"written and source differ in modules: {written.keys() ^ conversion.deltas.keys()}")
    modules = {}
    for done, (module, delta) in enumerate(conversion.deltas.items()):
        progress("comparing", done, len(written))
        modules[module] = _compare(written[module], delta)
    kept = {name: _difference(tensors[name], tensor) for name, tensor in conversion.kept.items()}
    return WrittenErrors(modules, kept)


def _compare(written: SourceDelta, source: SourceDelta) -> ModuleError:
    if (written.num_rows, written.width) != (source.num_rows, source.width):
        raise AssertionError("a written ΔW has another shape than the source's")
    ours, theirs = written.make(), source.make()
    at_once = max(1, _AT_ONCE // source.width)
    largest = total = squares = norm = 0.0
    for begin in range(0, source.num_rows, at_once):
        end = min(begin + at_once, source.num_rows)
        wanted = theirs(begin, end)  # [n, in]
        error = ours(begin, end) - wanted
        largest = max(largest, float(error.abs().max()))
        total += float(error.abs().sum())
        squares += float(error.square().sum())
        norm += float(wanted.square().sum())
    relative = (squares / norm) ** 0.5 if norm else float(squares > 0)
    return ModuleError(largest, total / (source.num_rows * source.width), relative, norm**0.5)


def _difference(written: Tensor, source: Tensor) -> float:
    if written.shape != source.shape:
        raise AssertionError("a copied tensor has another shape than the source's")
    return float((written.double() - source.double()).abs().max()) if source.numel() else 0.0
