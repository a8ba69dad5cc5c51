"""Runs steps on a device whose operations read their metadata there: staged in one copy, decode steps by graph.

A step whose rows all have one new token takes the graph of the smallest bucket that holds it; any other step, and any
step without a graph, runs eagerly at its own size, as does one whose adapters change more than outputs of linears and
norms. Knows nothing of queues, blocks' owners or sampling.
"""

import numpy as np
import torch
from torch import Tensor

from adapters.extras_batch import ExtrasBatch, IntArray32
from adapters.lora_batch import LoRABatch, RowRanges
from adapters.lora_layers import LoRALayers
from adapters.staged_extras import StagedExtras
from adapters.step_features import NO_FEATURES, StepFeature
from server.engine.attention.interface import AttentionMetadata
from server.engine.base_model import BaseModel
from server.engine.cuda_graphs import Bucket, DecodeGraphs, Graph, GraphBackend, bucket_sizes
from server.engine.device_step import DeviceStep, StagedParts, StagedStep, StepCaps, affine_step
from server.engine.forward_batch import ForwardBatch
from server.engine.model_runner import carry


class DeviceRunner:
    """`graphs` None runs every step eagerly. Call `capture` once, before the first step."""

    def __init__(
        self,
        base: BaseModel,
        lora: LoRALayers,
        *,
        parts: StagedParts,
        max_num_seqs: int,
        graphs: GraphBackend | None,
    ) -> None:
        self.base = base
        self.lora = lora
        self._parts = parts
        sizes = bucket_sizes(max_num_seqs) if graphs else ()
        self._caps = {size: self._bucket_caps(size) for size in sizes}
        self._step = DeviceStep(base.device, parts, buckets=tuple(self._caps.values()))
        self.graphs = DecodeGraphs(graphs, sizes, self._prepare, self._run) if graphs else None

    @torch.inference_mode()
    def capture(self, *, with_lora: bool = True) -> None:
        """Compile what prompts need, so that no request waits for it, and record the decode graphs, if there are to be
        any; without LoRA for a model that has no LoRA layers."""
        prompt = _prompt(has_lora=with_lora)
        staged = self._step.stage(prompt, self._exact_caps(prompt))
        self._forward(staged, _extras(prompt, staged), everywhere=True)
        if self.graphs is not None:
            self.graphs.capture(with_lora=with_lora)

    @torch.inference_mode()
    def execute(self, batch: ForwardBatch, last_ids: Tensor | None = None) -> Tensor:
        """Logits [num_logits, vocab] at `batch.logits_indices`; writes the new tokens' K and V into the cache. They
        are a graph's memory, which the next step overwrites.

        `last_ids` [at least the rows of the step before] on the device: what `batch.carried` points into.
        """
        found = self._graph_for(batch)
        staged = self._step.stage(batch, self._caps[found[0]] if found else self._exact_caps(batch))
        if batch.carried is not None:
            assert last_ids is not None
            staged.input_ids.copy_(carry(staged.input_ids, staged.carried, last_ids))
        logits = found[1].replay() if found else self._forward(staged, _extras(batch, staged))
        return logits[: len(batch.logits_indices)]

    def _graph_for(self, batch: ForwardBatch) -> tuple[int, Graph] | None:
        """The graph that can run the batch and the size of its bucket; None = run it eagerly."""
        num_rows = len(batch.attention.context_lens)
        is_decode = batch.attention.num_decode_rows == num_rows and len(batch.logits_indices) <= num_rows
        features = NO_FEATURES if batch.extras is None else batch.extras.features
        if self.graphs is None or not is_decode or features & ~StepFeature.AFFINE:  # the others are torch's operations
            return None
        # A bucket has room for one adapter per row; rows that compose several take a larger one.
        num_entries = 0 if batch.lora is None else len(batch.lora.starts)
        return self.graphs.find(
            max(num_rows, num_entries), has_lora=batch.lora is not None, has_affine=features == StepFeature.AFFINE
        )

    def _bucket_caps(self, num_rows: int) -> StepCaps:
        return StepCaps(
            num_tokens=num_rows,
            num_logits=num_rows,
            attention=self._parts.attention.bucket(num_rows),
            lora=self._parts.lora.bucket(num_rows),
            affine=self._parts.affine.bucket(num_rows),
        )

    def _exact_caps(self, batch: ForwardBatch) -> StepCaps:
        affine = affine_step(batch)
        return StepCaps(
            num_tokens=batch.num_tokens,
            num_logits=len(batch.logits_indices),
            attention=self._parts.attention.exact(batch.attention),
            lora=None if batch.lora is None else self._parts.lora.exact(batch.lora),
            affine=None if affine is None else self._parts.affine.exact(affine),
        )

    def _prepare(self, bucket: Bucket) -> None:
        """Stage a batch of padding, so that what is recorded writes no K and V and reads no adapter."""
        self._step.stage(_padding(bucket), self._caps[bucket.num_rows])

    def _run(self, bucket: Bucket) -> Tensor:
        """The forward pass over a bucket's static buffers, whatever stands there."""
        caps = self._caps[bucket.num_rows]
        staged = self._step.staged(caps, has_lora=bucket.has_lora, has_affine=bucket.has_affine)
        return self._forward(staged, _extras(_padding(bucket), staged), everywhere=True)

    def _forward(self, staged: StagedStep, extras: StagedExtras | None, *, everywhere: bool = False) -> Tensor:
        """Logits; `everywhere` for what must serve adapters that come later and target others than today's."""
        applying = self.lora.applying(staged.lora, extras=extras, everywhere=everywhere)
        with self.base.context.running(staged.attention), applying:
            return self.base.forward(staged.input_ids, staged.positions, staged.logits_indices)


def _extras(batch: ForwardBatch, staged: StagedStep) -> StagedExtras | None:
    """The batch's extras as the layers read them, over the tokens that it was staged as."""
    return None if batch.extras is None else StagedExtras(batch.extras, len(staged.input_ids), staged.affine)


def _affine_extras(tokens: IntArray32) -> ExtrasBatch:
    """Of a step with affine vectors at these tokens and nothing else."""
    return ExtrasBatch(StepFeature.AFFINE, affine_tokens=tokens, tokens=(), kept=(), num_head_rows=0)


def _prompt(*, has_lora: bool) -> ForwardBatch:
    """One row long enough for every kernel of a prompt, which writes no K and V: its slots are none."""
    num_tokens = 32  # as good as any: tiles are compiled for all numbers of tokens
    positions = np.arange(num_tokens)
    ranges: RowRanges = ((0, 1.0),) if has_lora else ()
    return ForwardBatch(
        input_ids=np.zeros(num_tokens, np.int64),
        positions=positions,
        logits_indices=positions[-1:],
        sampled=(),
        prompt_logprobs=(),
        attention=AttentionMetadata(
            query_starts=np.array([0, num_tokens], np.int32),
            context_lens=np.array([num_tokens], np.int32),
            block_tables=np.zeros((1, num_tokens), np.int32),
            slot_mapping=np.full(num_tokens, -1, np.int64),
            num_decode_rows=0,
        ),
        lora=LoRABatch.build([num_tokens], [ranges]),
        extras=_affine_extras(positions.astype(np.int32)) if has_lora else None,
    )


def _padding(bucket: Bucket) -> ForwardBatch:
    """A batch of the bucket's kind without rows."""
    nothing, none = np.zeros(0, np.int64), np.zeros(0, np.int32)
    lora = LoRABatch(np.zeros(1, np.int32), none, np.zeros(0, np.float32), none, ()) if bucket.has_lora else None
    return ForwardBatch(
        input_ids=nothing,
        positions=nothing,
        logits_indices=nothing,
        sampled=(),
        prompt_logprobs=(),
        attention=AttentionMetadata(
            query_starts=np.zeros(1, np.int32),
            context_lens=none,
            block_tables=np.zeros((0, 0), np.int32),
            slot_mapping=nothing,
            num_decode_rows=0,
        ),
        lora=lora,
        extras=_affine_extras(none) if bucket.has_affine else None,
    )
