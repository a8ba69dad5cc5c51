"""PiSSA, OLoRA and KaSA adapters → plain LoRA of twice the rank on the base as it was.

Before training, PEFT takes a low-rank part T out of every targeted weight: it computes (W - T) + s·B·A, and takes T out
anew whenever the adapter is loaded. T is known from W, so ΔW = s·B·A - T is a pair of rank 2r on W itself, exactly.
KaSA's B is B·diag(lora_diag).

s·B·A and T are large and nearly equal, so [s·B, -left] and [A; right] side by side would lose in 16 bits what they
cancel. The product is factored anew (QR, then SVD of the small core, in float64): its factors are as small as ΔW is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adapters.base_weights import BaseWeights
from adapters.convert.base_outline import BaseOutline
from adapters.convert.conversion import Conversion, Progress, RowsOf, SourceDelta, no_progress
from adapters.convert.failure import CannotConvert
from adapters.convert.lora_pairs import LoRAPairs, Pair, embedding_tensors, linear_tensors, sort_pairs
from adapters.convert.scale_rule import ScaleRule, fields_of_scale_one
from adapters.convert.taken_out import Method, TakenOut, dense_rows, factors

_LEAST_GAP = 1e-5
_COPY_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-2}


@dataclass(frozen=True, slots=True)
class SingularBase:
    """`dtype` is the one in which PEFT held the weights, and in which it kept what it left of them."""

    outline: BaseOutline
    weights: BaseWeights
    dtype: torch.dtype


def convert_singular(
    method: Method,
    config: Mapping[str, object],
    tensors: Mapping[str, Tensor],
    base: SingularBase,
    progress: Progress = no_progress,
) -> Conversion:
    """Raises CannotConvert when a pair does not fit the config or the base, AdapterRefused for unreadable patterns."""
    pairs, rule = sort_pairs(tensors), ScaleRule.of(config)
    maker = _Maker(method, pairs, rule, base)
    names = base.outline.resolve(list(pairs.linears)) if pairs.linears else {}
    for done, (module, pair) in enumerate(pairs.linears.items()):
        progress("decomposing", done, len(names))
        maker.add_linear(module, names[module], pair)
    for module, pair in pairs.embeddings.items():
        maker.add_embedding(module, pair)
    return maker.finish(config)


@dataclass(slots=True)
class _Maker:
    """The adapter as it grows. Modules are called as the file calls them, `of_base` as the base does."""

    method: Method
    pairs: LoRAPairs
    rule: ScaleRule
    base: SingularBase
    tensors: dict[str, Tensor] = field(default_factory=dict)
    deltas: dict[str, SourceDelta] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)  # of the other tensors: those that have no place in the result
    close: list[str] = field(default_factory=list)
    rounding: dict[str, float] = field(default_factory=dict)

    def add_linear(self, module: str, of_base: str, pair: Pair) -> None:
        self._check(module, of_base, pair)
        diagonal = self._diagonal_of(module, len(pair[0]))  # [r]
        lora_a, lora_b = pair[0], pair[1].float() * diagonal
        r, scale = lora_a.shape[0], self.rule.scale_of(module)
        is_transposed = of_base in self.base.outline.transposed
        weight = _whole(self.base, of_base)
        taken = factors(self.method, weight, r, scale, is_transposed=is_transposed)
        left = torch.cat([scale * lora_b.double(), -taken.left.double()], dim=1)  # [out, 2r]
        right = torch.cat([lora_a.double(), taken.right.double()])  # [2r, in]
        made_a, made_b, norm = _factored_anew(left, right)
        self._judge(module, weight, taken, norm)
        self.tensors |= linear_tensors(module, (made_a, made_b), wrapper=self.pairs.wrapper)
        self.ranks[module] = made_a.shape[0]
        rows = _source_rows(self.method, self.base, of_base, pair, diagonal, scale)
        self.deltas[module] = SourceDelta(weight.shape[0], weight.shape[1], rows)

    def add_embedding(self, module: str, pair: Pair) -> None:
        """PEFT starts embeddings in the plain way whatever the config says, so only the scale goes into B."""
        lora_a, lora_b = pair  # [r, V], [H, r]
        scale = self.rule.scale_of(module)
        self.tensors |= embedding_tensors(module, (lora_a, scale * lora_b.float()), wrapper=self.pairs.wrapper)
        self.deltas[module] = SourceDelta.of_product(scale, lora_a.T, lora_b.T)
        self.ranks[module] = lora_a.shape[0]

    def finish(self, config: Mapping[str, object]) -> Conversion:
        if not self.ranks:
            raise CannotConvert("the file holds no pairs of lora_A and lora_B")
        kept = {name: tensor for name, tensor in self.pairs.rest.items() if name not in self.used}
        if left := [name for name in kept if name.endswith(".lora_diag")]:
            raise CannotConvert(f"{left[0]} belongs to no pair in the file")
        changed = {"init_lora_weights": True, "kasa_config": None, **fields_of_scale_one(self.ranks)}
        return Conversion({**config, **changed}, self.tensors | kept, self.deltas, kept, self._warnings())

    def _check(self, module: str, of_base: str, pair: Pair) -> None:
        shape, (lora_a, lora_b) = self.base.outline.linears.get(of_base), pair
        if shape != (lora_b.shape[0], lora_a.shape[1]):
            wanted = "no linear" if shape is None else f"{list(shape)}"
            have = f"A {list(lora_a.shape)} and B {list(lora_b.shape)}"
            raise CannotConvert(f"{module} has {have} and is {wanted} in the base: is it the base of the training?")
        if lora_a.shape[0] != self.rule.rank_of(module):
            raise CannotConvert(f"{module} has rank {lora_a.shape[0]}, its config says {self.rule.rank_of(module)}")
        if of_base in self.base.outline.tied:
            raise CannotConvert(
                f"{module} shares its weight with the embedding, of which {self.method} took the same part away, and "
                "no adapter on linears puts it back; serve the changed base"
            )

    def _diagonal_of(self, module: str, lora_rank: int) -> Tensor:
        """What stands between B and A: ones, but for KaSA."""
        if self.method != "kasa":
            return torch.ones(lora_rank)
        name = f"{self.pairs.wrapper}{module}.lora_diag"
        diagonal = self.pairs.rest.get(name)
        if diagonal is None or diagonal.shape != (lora_rank,):
            raise CannotConvert(f"{name} is missing or not as long as the rank")
        self.used.add(name)
        return diagonal.float()

    def _judge(self, module: str, weight: Tensor, taken: TakenOut, norm: float) -> None:
        """What the numbers cannot say by themselves: parts that are not unique, and what rounding did in training."""
        if taken.gap < _LEAST_GAP:
            self.close.append(module)
        name = f"{self.pairs.wrapper}{module}.base_layer.weight"
        stored = self.pairs.rest.get(name)
        if stored is None and self.base.dtype is torch.float32:
            return
        remaining = weight - taken.left @ taken.right
        if self.base.dtype is not torch.float32:
            error = torch.linalg.vector_norm(remaining.to(self.base.dtype).float() - remaining)
            self.rounding[module] = float(error) / max(norm, 1e-30)
        if stored is not None:
            self._drop_copy(name, stored, remaining)

    def _drop_copy(self, name: str, stored: Tensor, remaining: Tensor) -> None:
        """PEFT saves a targeted head's weight as it was left; the pair of twice the rank stands on the whole one."""
        limit = _COPY_TOLERANCE[stored.dtype] * float(remaining.abs().max())
        is_same = stored.shape == remaining.shape and float((stored.float() - remaining).abs().max()) <= limit
        if not is_same:
            raise CannotConvert(
                f"{name} is not what {self.method} leaves of this base: is it the base of the training?"
            )
        self.used.add(name)

    def _warnings(self) -> tuple[str, ...]:
        found = []
        if self.close:
            found.append(
                f"the part taken out of {len(self.close)} modules, such as {self.close[0]}, is not unique: singular "
                "values lie too close together, and PEFT itself may take another at every load"
            )
        if self.rounding:
            worst = max(self.rounding, key=lambda module: self.rounding[module])
            found.append(
                f"the base is {str(self.base.dtype).removeprefix('torch.')}, and PEFT rounds what it leaves of W to "
                f"that at every load, by up to {self.rounding[worst]:.1e} of ‖ΔW‖ ({worst}); the adapter written here "
                "stands on W as it is, without that"
            )
        return tuple(found)


def _whole(base: SingularBase, module: str) -> Tensor:
    """W [out, in] float32"""
    return base.weights.rows(f"{module}.weight", 0, base.outline.linears[module][0])


def _source_rows(
    method: Method, base: SingularBase, module: str, pair: Pair, diagonal: Tensor, scale: float
) -> Callable[[], RowsOf]:
    """s·B·A less what was taken out, by the way `dense_rows` goes."""

    def make() -> RowsOf:
        lora_a, lora_b = diagonal.double()[:, None] * pair[0].double(), pair[1].double()
        is_transposed = module in base.outline.transposed
        taken = dense_rows(method, _whole(base, module), len(lora_a), scale, is_transposed=is_transposed)
        return lambda begin, end: scale * (lora_b[begin:end] @ lora_a) - taken(begin, end)

    return make


def _factored_anew(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, float]:
    """A [k, in], B [out, k] float32 of left [out, k] · right [k, in], each with the root of every singular value; and
    the product's norm.
    """
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T)  # [k, k]
    root = s.sqrt()
    return (root[:, None] * (vh @ q_right.T)).float(), ((q_left @ u) * root).float(), float(s.norm())
