"""Low-rank pairs under any names → a PEFT adapter, by a map that says which tensors belong to which module.

    {"u": "{module}.U", "v": "{module}.V"}                                            every module alike
    {"modules": {"model.layers.0.mlp.up_proj": {"u": "a.0", "v": "b.0", "scale": 2}}} each by itself

ΔW [out, in] = scale · u·v, where u may be stored [out, r] or [r, out] and v [r, in] or [in, r]; what is named u may
also be the input's side, when outputs are computed as x·u·v. Which of these it is, the base's shapes say, for all
modules alike; where they cannot (all weights square), "orientation" in the map must: "uv" is W + u·v, "vu" is Wᵀ + u·v.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from adapters.convert.base_outline import BaseOutline
from adapters.convert.conversion import Conversion, RowsOf, SourceDelta
from adapters.convert.failure import CannotConvert
from adapters.convert.lora_pairs import Pair, linear_tensors
from adapters.convert.new_config import new_config
from adapters.convert.scale_rule import number
from adapters.untrusted_json import shown

_PLACE = "{module}"
_FIELDS = {"u", "v", "scale", "orientation", "modules"}


@dataclass(frozen=True, slots=True)
class PairsOptions:
    base_name: str
    name_map: Mapping[str, object]
    alpha: float | None = None  # the scale is alpha / r; else the map's, else 1
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class _Layout:
    """How all pairs of a file are stored."""

    orientation: str  # "uv": u is the output's side
    is_u_rank_first: bool
    is_v_rank_first: bool

    def rank_of(self, u: Tensor, v: Tensor, shape: tuple[int, int]) -> int | None:
        """r when u and v are stored so for a weight of `shape` [out, in], else None."""
        u_rank, u_width = self._split(u, self.is_u_rank_first)
        v_rank, v_width = self._split(v, self.is_v_rank_first)
        wanted = shape if self.orientation == "uv" else shape[::-1]
        return u_rank if u_rank == v_rank and (u_width, v_width) == wanted else None

    def as_pair(self, u: Tensor, v: Tensor) -> Pair:
        """A [r, in] and B [out, r]."""
        u, v = (u if self.is_u_rank_first else u.T), (v if self.is_v_rank_first else v.T)  # [r, width] both
        return (v, u.T) if self.orientation == "uv" else (u, v.T)

    def dense(self, u: Tensor, v: Tensor) -> Tensor:
        """ΔW [out, in] in float64, from the tensors as they are stored."""
        axes = ([0 if self.is_u_rank_first else 1], [0 if self.is_v_rank_first else 1])
        of_product: Tensor = torch.tensordot(u.double(), v.double(), dims=axes)  # [u's width, v's width]
        return of_product if self.orientation == "uv" else of_product.T

    @staticmethod
    def _split(tensor: Tensor, is_rank_first: bool) -> tuple[int, int]:
        lora_rank, width = tensor.shape if is_rank_first else tensor.shape[::-1]
        return int(lora_rank), int(width)


@dataclass(frozen=True, slots=True)
class _Stored:
    u: Tensor
    v: Tensor
    scale: float | None


_LAYOUTS = tuple(_Layout(*each) for each in product(("uv", "vu"), (False, True), (False, True)))


def convert_pairs(tensors: Mapping[str, Tensor], base: BaseOutline, options: PairsOptions) -> Conversion:
    """Raises CannotConvert naming the tensor or module that has no place, no partner or another shape."""
    stored = _stored_pairs(tensors, options.name_map)
    names = base.resolve(list(stored))
    of_base = {names[name]: pair for name, pair in stored.items()}
    layout = _layout_of(of_base, base, options)
    written: dict[str, Tensor] = {}
    deltas: dict[str, SourceDelta] = {}
    ranks: dict[str, int] = {}
    for module, pair in of_base.items():
        lora_a, lora_b = layout.as_pair(pair.u, pair.v)
        ranks[module] = lora_a.shape[0]
        scale = _scale_of(pair, ranks[module], options)
        written |= linear_tensors(module, (lora_a.float(), scale * lora_b.float()))
        deltas[module] = SourceDelta(lora_b.shape[0], lora_a.shape[1], _rows(layout, pair, scale))
    return Conversion(new_config(options.base_name, ranks), written, deltas)


def _rows(layout: _Layout, pair: _Stored, scale: float) -> Callable[[], RowsOf]:
    def make() -> RowsOf:
        dense = scale * layout.dense(pair.u, pair.v)
        return lambda begin, end: dense[begin:end]

    return make


def _scale_of(pair: _Stored, lora_rank: int, options: PairsOptions) -> float:
    if options.alpha is None:
        return 1.0 if pair.scale is None else pair.scale
    if pair.scale is not None:
        raise CannotConvert("both --alpha and a scale in the map are given; which of them is meant?")
    return options.alpha / lora_rank


def _layout_of(pairs: Mapping[str, _Stored], base: BaseOutline, options: PairsOptions) -> _Layout:
    """The one layout in which every pair fits its weight."""
    asked = options.name_map.get("orientation")
    if asked not in (None, "uv", "vu"):
        raise CannotConvert(f'"orientation" in the map is {shown(asked)}; it is "uv" or "vu"')
    layouts = [layout for layout in _LAYOUTS if asked in (None, layout.orientation)]
    for module, pair in pairs.items():
        shape = base.linears.get(module)
        if shape is None:
            raise CannotConvert(f"{module} of the base is no linear")
        ranks = {layout: layout.rank_of(pair.u, pair.v, shape) for layout in layouts}
        layouts = [layout for layout, r in ranks.items() if r is not None and options.rank in (None, r)]
        if not layouts:
            raise CannotConvert(
                f"{module} is {list(shape)} in the base; u {list(pair.u.shape)} and v {list(pair.v.shape)} are no pair "
                "for it that is stored as those before it, of the rank asked for"
            )
    if len(layouts) > 1:
        kinds = {layout.orientation for layout in layouts}
        way = 'write "orientation": "uv" or "vu" into the map' if len(kinds) > 1 else "give --rank"
        raise CannotConvert(f"the shapes fit in {len(layouts)} ways, since the weights are square; {way}")
    return layouts[0]


def _stored_pairs(tensors: Mapping[str, Tensor], name_map: Mapping[str, object]) -> dict[str, _Stored]:
    """module → its tensors; every tensor is used once."""
    if unknown := name_map.keys() - _FIELDS:
        raise CannotConvert(
            f"the map has {', '.join(sorted(map(shown, unknown)))}; known are {', '.join(sorted(_FIELDS))}"
        )
    modules = name_map.get("modules")
    names = _listed(modules) if modules is not None else _by_template(tensors, name_map)
    used = [key for u, v, _ in names.values() for key in (u, v)]
    for key in used:
        if key not in tensors or tensors[key].ndim != 2 or used.count(key) > 1:
            raise CannotConvert(f"{shown(key)} is not there, no matrix, or named twice")
    if left := sorted(tensors.keys() - set(used)):
        raise CannotConvert(
            f"{len(left)} tensors are in no pair of the map, such as {shown(left[0])}; none is left out"
        )
    common = name_map.get("scale")
    return {
        module: _Stored(tensors[u], tensors[v], _scale(common if scale is None else scale))
        for module, (u, v, scale) in sorted(names.items())
    }


def _scale(value: object) -> float | None:
    return None if value is None else number("scale", value)


def _listed(modules: object) -> dict[str, tuple[str, str, object]]:
    if not isinstance(modules, dict) or not modules:
        raise CannotConvert('"modules" in the map is no table of modules')
    found = {}
    for module, entry in modules.items():
        if not isinstance(entry, dict) or not entry.keys() <= {"u", "v", "scale"}:
            raise CannotConvert(f'{shown(module)} in the map is no table of "u", "v" and "scale"')
        found[module] = (*_two_names(entry), entry.get("scale"))
    return found


def _by_template(tensors: Mapping[str, Tensor], name_map: Mapping[str, object]) -> dict[str, tuple[str, str, object]]:
    templates = _two_names(name_map)
    found: list[dict[str, str]] = []
    for template in templates:
        before, place, after = template.partition(_PLACE)
        if not place:
            raise CannotConvert(f"{shown(template)} in the map has no {_PLACE} in it")
        keys = [k for k in tensors if k.startswith(before) and k.endswith(after) and len(k) > len(before) + len(after)]
        found.append({key[len(before) : len(key) - len(after)]: key for key in keys})
    of_u, of_v = found
    if lone := sorted(of_u.keys() ^ of_v.keys()):
        raise CannotConvert(f"{shown(lone[0])} has only one of {shown(templates[0])} and {shown(templates[1])}")
    if not of_u:
        raise CannotConvert(f"no tensor is called {shown(templates[0])}")
    return {module: (key, of_v[module], None) for module, key in of_u.items()}


def _two_names(entry: Mapping[str, object]) -> tuple[str, str]:
    u, v = entry.get("u"), entry.get("v")
    if not isinstance(u, str) or not isinstance(v, str):
        raise CannotConvert('the map has no names for "u" and "v"')
    return u, v
