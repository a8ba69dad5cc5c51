"""What an adapter holds besides low-rank pairs of linears, ready to be computed with: the loader fills it, the layers
apply it. Immutable, tensors on the CPU.

Everything is the adapter's own y = g ⊙ (W x + B A x) + b + δb, where W and b stay the base's: B already carries s and g
(`lora_model.LoRAWeights`), so a gain here scales the base's part alone. Knows nothing of files, devices or steps.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Rows of an embedding or of a head that replace the base's; they are absolute, not deltas."""

    ids: Tensor  # [n] int64, ascending, no two alike
    values: Tensor  # [n, hidden] in the compute dtype


@dataclass(frozen=True, slots=True)
class EmbeddingAdapter:
    """y = E[id] + (lora_a[id]) · lora_b, where E is the base's, or `weight`, with `rows` put in.

    What the model multiplies its embeddings by (Gemma) is not in here: lookups of all kinds are multiplied by it.
    """

    lora_a: Tensor | None = None  # [V', r], PEFT's lora_embedding_A transposed, in the compute dtype
    lora_b: Tensor | None = None  # [r, hidden], carries s and g
    rows: TokenRows | None = None
    weight: Tensor | None = None  # [V', hidden], in place of the base's


@dataclass(frozen=True, slots=True)
class HeadAdapter:
    """Replacements in the output layer; its low-rank pair stands among the adapter's modules under the head's name."""

    rows: TokenRows | None = None
    weight: Tensor | None = None  # [V', hidden], in place of the base's
    bias: Tensor | None = None  # [V'] float32, in place of the base's


@dataclass(frozen=True, slots=True)
class ExpertPair:
    """y_e += (x · a[e]ᵀ) · b[e] for a token that expert e computes, in the order of the fused product's outputs."""

    a: Tensor  # [E, r, in]
    b: Tensor  # [E, r, out], carries s


@dataclass(frozen=True, slots=True)
class ExpertPairs:
    gate_up: ExpertPair | None = None
    down: ExpertPair | None = None


def _none() -> Mapping[str, Tensor]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterExtras:
    """Maps are by full module name in the base (`norms` by full parameter name), vectors in float32."""

    gains: Mapping[str, Tensor] = field(default_factory=_none)  # g [out] of DoRA, or of IA3; also of embedding and head
    gain_covers_bias: frozenset[str] = frozenset()  # modules whose g scales the base's bias, too: IA3
    input_scales: Mapping[str, Tensor] = field(default_factory=_none)  # l [in]: the base's part sees l ⊙ x
    biases: Mapping[str, Tensor] = field(default_factory=_none)  # δb [out]
    norms: Mapping[str, Tensor] = field(default_factory=_none)  # in place of a norm's weight or bias
    embedding: EmbeddingAdapter | None = None
    head: HeadAdapter | None = None
    experts: Mapping[str, ExpertPairs] = field(default_factory=lambda: MappingProxyType({}))  # by experts module
    vocab_size: int | None = None  # V' where it is not the base's
    invocation_tokens: tuple[int, ...] = ()  # aLoRA: nothing acts before the last occurrence of these in the prompt
    tokenizer_files: Mapping[str, bytes] = field(default_factory=lambda: MappingProxyType({}))  # those it brings itself
    replaced: frozenset[str] = frozenset()
    """What one adapter of a request only may replace: parameter names of norms, `<linear>.bias`, `<embedding>` or
    `<embedding>[id]`, the same of the head, "vocabulary", "tokenizer"."""
    base_print: str = ""
    """Identity of the base weights that gains, δb or comparisons were computed from; "" when none were."""

    def tensors(self) -> Iterator[Tensor]:
        for table in (self.gains, self.input_scales, self.biases, self.norms):
            yield from table.values()
        yield from self._whole_tensors()

    def _whole_tensors(self) -> Iterator[Tensor]:
        """Those that the layers apply as they are."""
        for part in (self.embedding, self.head):
            if part is not None:
                rows = () if part.rows is None else (part.rows.ids, part.rows.values)
                yield from (tensor for tensor in (part.weight, *rows) if tensor is not None)
        if self.embedding is not None and self.embedding.lora_a is not None and self.embedding.lora_b is not None:
            yield from (self.embedding.lora_a, self.embedding.lora_b)
        if self.head is not None and self.head.bias is not None:
            yield self.head.bias
        for pairs in self.experts.values():
            for pair in (pairs.gate_up, pairs.down):
                if pair is not None:
                    yield from (pair.a, pair.b)

    @property
    def num_bytes(self) -> int:
        """Of all tensors and files, and of the vectors that the layers make when it is loaded."""
        in_files = sum(map(len, self.tokenizer_files.values()))
        return in_files + sum(map(_num_bytes, self.tensors())) + self.num_vector_bytes

    @property
    def num_applied_bytes(self) -> int:
        """Of what the layers apply."""
        return sum(map(_num_bytes, self._whole_tensors())) + self.num_vector_bytes

    @property
    def num_vector_bytes(self) -> int:
        """Two vectors for all outputs that are scaled, shifted or a replaced norm's, one for scaled inputs: float32, in
        whole pieces of 16 bytes (applied_extras.py). A norm that is computed anew takes no more."""
        outputs = {**self.biases, **self.gains}
        norms = {name.rpartition(".")[0]: parameter for name, parameter in self.norms.items()}
        counts = [2 * vector.numel() for vector in (*outputs.values(), *norms.values())]
        counts += [vector.numel() for vector in self.input_scales.values()]
        return sum(-(-count // 4) * 16 for count in counts)

    def __bool__(self) -> bool:
        """Whether there is anything that a plain adapter does not have."""
        return any(True for _ in self.tensors()) or bool(
            self.invocation_tokens or self.tokenizer_files or self.replaced
        )


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


NO_EXTRAS = AdapterExtras()
