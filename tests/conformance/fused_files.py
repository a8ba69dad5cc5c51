"""Files whose linears are parts of the base's, or several of them in one, with more than A and B: magnitudes, biases.

PEFT reads neither; the judge is the dense weights, made here in float64 by the rules that PEFT has for linears.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from tests.conformance.expert_files import FUSED, PREFIX, R, _config, _pair
from tests.conformance.making import Adapter, Files, Make, seed_of
from tests.conformance.models import fresh
from tests.conformance.oracle import DenseOracle
from tests.conformance.traits import Traits

SCALE = 2.0
JOINT = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""As Phi-3 calls them: wider linear → its parts in the order of its outputs."""


def split_with_dora(traits: Traits, folder: Path) -> Adapter:
    """DoRA on q and v alone, and on up: the other rows of the fused product are the base's."""
    tensors: dict[str, Tensor] = {}
    deltas: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(seed_of(folder))
    for linear, name, rows in _parts(traits):
        if name.rpartition(".")[2] in ("k_proj", "gate_proj"):
            continue
        a, b = _pair(generator, traits.shapes[linear][0], rows.stop - rows.start)
        before = _weight(traits, linear)[rows]
        after, magnitude = _dora(before, a, b, generator)
        _write(tensors, name, a, b, lora_magnitude_vector=magnitude)
        _add(deltas, traits, linear, rows, after - before)
    Files({**_config("q_proj", "v_proj", "up_proj"), "use_dora": True}, tensors).write(folder)
    return Adapter(folder, DenseOracle(traits.architecture, deltas))


def split_with_bias(traits: Traits, folder: Path) -> Adapter:
    """A bias of B on k and v."""
    tensors: dict[str, Tensor] = {}
    deltas: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(seed_of(folder))
    for linear, name, rows in _parts(traits):
        if name.rpartition(".")[2] not in ("k_proj", "v_proj"):
            continue
        a, b = _pair(generator, traits.shapes[linear][0], rows.stop - rows.start)
        bias = torch.randn(rows.stop - rows.start, generator=generator) * 0.2
        _write(tensors, name, a, b)
        tensors[f"{PREFIX}{name}.lora_B.bias"] = bias
        _add(deltas, traits, linear, rows, SCALE * b.double() @ a.double())
        deltas.setdefault(f"{linear}.bias", torch.zeros(traits.shapes[linear][1]).double())[rows] += SCALE * bias
    Files({**_config("k_proj", "v_proj"), "lora_bias": True}, tensors).write(folder)
    return Adapter(folder, DenseOracle(traits.architecture, deltas))


def joint(*, use_dora: bool = False, lora_bias: bool = False) -> Make:
    """One pair for q, k and v together, and one for gate and up, on a base that keeps them apart."""

    def make(traits: Traits, folder: Path) -> Adapter:
        tensors: dict[str, Tensor] = {}
        deltas: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(seed_of(folder))
        for wide, parts in wider(traits, biased=lora_bias):
            before = torch.cat([_weight(traits, part) for part in parts])  # [Σout, in]
            a, b = _pair(generator, before.shape[1], before.shape[0])
            _write(tensors, wide, a, b)
            after = before + SCALE * b.double() @ a.double()
            if use_dora:
                after, magnitude = _dora(before, a, b, generator)
                tensors[f"{PREFIX}{wide}.lora_magnitude_vector"] = magnitude
            for part, delta in zip(parts, (after - before).split([traits.shapes[p][1] for p in parts]), strict=True):
                deltas[f"{part}.weight"] = delta
            if lora_bias:
                bias = torch.randn(len(before), generator=generator) * 0.2
                tensors[f"{PREFIX}{wide}.lora_B.bias"] = bias
                for part, own in zip(parts, bias.split([traits.shapes[p][1] for p in parts]), strict=True):
                    deltas[f"{part}.bias"] = SCALE * own.double()
        config = _config(*{wide.rpartition(".")[2] for wide, _ in wider(traits, biased=lora_bias)})
        Files({**config, "use_dora": use_dora, "lora_bias": lora_bias}, tensors).write(folder)
        return Adapter(folder, DenseOracle(traits.architecture, deltas))

    return make


def wider(traits: Traits, *, biased: bool = False) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Wider linears that the base has in parts, or those of them whose parts have a bias each."""
    parameters = dict(fresh(traits.architecture).named_parameters())
    for linear in traits.linears:
        outer, _, last = linear.rpartition(".")
        for wide, parts in JOINT.items():
            names = tuple(f"{outer}.{part}" for part in parts)
            are_there = last == parts[0] and all(name in traits.linears for name in names)
            if are_there and (not biased or all(f"{name}.bias" in parameters for name in names)):
                yield f"{outer}.{wide}", names


def _parts(traits: Traits) -> Iterator[tuple[str, str, slice]]:
    """The base's linear, the part's name, its rows."""
    for linear in traits.linears:
        outer, _, last = linear.rpartition(".")
        begin = 0
        for part, width in FUSED[traits.architecture].get(last, ()):
            yield linear, f"{outer}.{part}", slice(begin, begin + width)
            begin += width


def _weight(traits: Traits, linear: str) -> Tensor:
    """[out, in] in float64."""
    weight = fresh(traits.architecture).get_parameter(f"{linear}.weight").detach().double()
    return weight.T if traits.is_transposed else weight


def _dora(before: Tensor, a: Tensor, b: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The weight it makes of `before` [out, in], and a magnitude [out] that is a third away from the base's norms."""
    adapted = before + SCALE * b.double() @ a.double()
    magnitude = before.norm(dim=1) * (0.7 + 0.6 * torch.rand(len(before), generator=generator).double())
    magnitude = magnitude.float()
    return (magnitude.double() / adapted.norm(dim=1))[:, None] * adapted, magnitude


def _write(tensors: dict[str, Tensor], module: str, a: Tensor, b: Tensor, **more: Tensor) -> None:
    assert a.shape[0] == b.shape[1] == R
    tensors[f"{PREFIX}{module}.lora_A.weight"], tensors[f"{PREFIX}{module}.lora_B.weight"] = a, b
    tensors.update({f"{PREFIX}{module}.{name}": tensor for name, tensor in more.items()})


def _add(deltas: dict[str, Tensor], traits: Traits, linear: str, rows: slice, delta: Tensor) -> None:
    name, (in_features, out_features) = f"{linear}.weight", traits.shapes[linear]
    if name not in deltas:
        whole = torch.zeros(out_features, in_features).double()
        deltas[name] = whole.T if traits.is_transposed else whole
    whole = deltas[name].T if traits.is_transposed else deltas[name]
    whole[rows] += delta
