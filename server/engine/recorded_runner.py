"""Runs decode steps on the CPU from recordings, one for each number of rows, with adapters of each kind and without.

What differs between two steps of as many rows lies in places that stay: token ids, positions, block tables, which
adapter each row has. Steps with prompts, and the first step of each number of rows, run the model's own code. Knows
nothing of queues, blocks' owners or sampling.
"""

import logging
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from adapters.lora_layers import LoRALayers
from adapters.ops import bf16_dot
from adapters.ops.cpu import StagedBatch
from adapters.ops.thread_team import current_team
from adapters.staged_extras import StagedExtras
from adapters.step_features import NO_FEATURES, RECORDABLE, StepFeature
from server.engine.attention.cpu import CPUAttention
from server.engine.attention.interface import AttentionMetadata
from server.engine.base_model import BaseModel
from server.engine.forward_batch import ForwardBatch
from server.engine.model_runner import ModelRunner, carry, staged_extras
from server.engine.recording import Recording, record
from server.engine.tensor_arena import TensorArena

logger = logging.getLogger(__name__)


class _Kind(NamedTuple):
    """Steps of one kind have one recording."""

    num_rows: int
    has_lora: bool
    features: StepFeature = NO_FEATURES  # that its adapters have together


@dataclass(slots=True)
class _Step:
    """The tensors that a kind of step reads, and its recording once there is one."""

    input_ids: Tensor  # int64 [num_rows]
    positions: Tensor  # int64 [num_rows]
    logits_indices: Tensor  # int64 [num_rows]
    lora: StagedBatch | None
    extras: StagedExtras | None = None
    recording: Recording | None = None
    is_eager: bool = False  # it could not be recorded

    def fill(
        self, batch: ForwardBatch, input_ids: Tensor, lora: StagedBatch | None, extras: StagedExtras | None
    ) -> None:
        self.input_ids.copy_(input_ids)
        self.positions.copy_(torch.from_numpy(batch.positions))
        self.logits_indices.copy_(torch.from_numpy(batch.logits_indices))
        if self.lora is not None and lora is not None:
            self.lora.become(lora)
        if self.extras is not None and extras is not None:
            self.extras.become(extras)


@dataclass
class RecordedRunner:
    """For a base that `serves`. `is_recording` False = every step runs the model's own code."""

    base: BaseModel
    lora: LoRALayers
    is_recording: bool = True
    _steps: dict[_Kind, _Step] = field(default_factory=dict)
    _arena: TensorArena = field(default_factory=TensorArena)

    def __post_init__(self) -> None:
        assert isinstance(self.base.context.backend, CPUAttention)
        self._attention = self.base.context.backend
        self._team = current_team()
        self._eager = ModelRunner(self.base, self.lora)

    @staticmethod
    def serves(base: BaseModel) -> bool:
        """Whether a step consists of our kernels; one of torch's operations gains nothing by being recorded."""
        is_ours = isinstance(base.context.backend, CPUAttention) and bf16_dot.is_supported()
        return is_ours and base.dtype is torch.bfloat16

    @property
    def num_recordings(self) -> int:
        return sum(step.recording is not None for step in self._steps.values())

    @torch.inference_mode()
    def execute(self, batch: ForwardBatch, last_ids: Tensor | None = None) -> Tensor:
        """Logits [num_logits, vocab] at `batch.logits_indices`; writes the new tokens' K and V into the cache. They
        are a recording's memory, which the next step overwrites.

        `last_ids` [at least the rows of the step before]: what `batch.carried` points into.
        """
        kind = self._kind(batch)
        step = self._steps.get(kind) if kind else None
        if kind is None or step is None or step.is_eager:
            if kind is not None and step is None:
                self._steps[kind] = _empty(kind)
            return self._eager.execute(batch, last_ids)
        input_ids = torch.from_numpy(batch.input_ids)
        if batch.carried is not None:
            assert last_ids is not None
            input_ids = carry(input_ids, torch.from_numpy(batch.carried), last_ids)
        lora = None if batch.lora is None else self.lora.ops.stage(batch.lora)
        extras = staged_extras(batch, self.lora)
        if step.lora is None and lora is not None:
            step.lora, step.extras = StagedBatch(lora.batch), staged_extras(batch, self.lora)
        step.fill(batch, input_ids, lora, extras)
        try:
            return self._play(step.recording, batch.attention) if step.recording else self._record(step, batch)
        except Exception as error:  # new tokens are written where they would have been, so the step can run again
            step.is_eager, step.recording = True, None
            logger.warning("steps of %s are not recorded and run slower: %s: %s", kind, type(error).__name__, error)
            return self._eager.execute(batch, last_ids)

    def _kind(self, batch: ForwardBatch) -> _Kind | None:
        """None for a step that is not recorded: with a prompt in it, a row that samples nothing, or an adapter whose
        tensors have other shapes than the base's."""
        num_rows = batch.attention.num_decode_rows
        features = NO_FEATURES if batch.extras is None else batch.extras.features
        is_decode = num_rows == batch.num_tokens == len(batch.logits_indices)
        if not is_decode or not self.is_recording or features & ~RECORDABLE:
            return None
        return _Kind(num_rows, batch.lora is not None, features)

    def _play(self, recording: Recording, attention: AttentionMetadata) -> Tensor:
        self._attention.prepare(attention)
        with self.base.step_context():
            return recording.play()

    def _record(self, step: _Step, batch: ForwardBatch) -> Tensor:
        """Run a step and keep its recording."""
        self._attention.prepare(batch.attention)  # of this step alone, so not to be recorded
        with (
            self.base.step_context(),
            self.base.context.running(batch.attention),
            self.lora.applying(step.lora, extras=step.extras, everywhere=True),
        ):
            logits, step.recording = record(lambda: self._forward(step), self._team, self._arena)
        return logits

    def _forward(self, step: _Step) -> Tensor:
        return self.base.forward(step.input_ids, step.positions, step.logits_indices)

    def try_out(self) -> None:
        """Stop recording unless a recorded step gives, for other tokens at other places, the very bits of the model's
        own code: code that branches on numbers which no operation shows would be caught. Before the first request."""
        kv = self.base.bindings[0].kv
        assert kv is not None
        num_blocks, block_size = kv.k_cache.shape[:2]
        if num_blocks < 2:  # no room for the trial's two rows
            self.is_recording = False
            return
        first, second = _trial(block_size, [1, 2], [0, 1], [0, 1]), _trial(block_size, [4, 3], [1, 0], [1, 0])
        with torch.inference_mode():
            expected = self._eager.execute(second).clone()
        self.execute(first)
        self.execute(first)
        is_equal = torch.equal(self.execute(second), expected)
        if not is_equal:
            logger.warning("decode steps are not recorded and run slower: a recorded one gave other logits")
        self.is_recording = is_equal and not any(step.is_eager for step in self._steps.values())
        self._steps.clear()


def _empty(kind: _Kind) -> _Step:
    input_ids, positions, logits_indices = torch.zeros(3, kind.num_rows, dtype=torch.int64).unbind()
    return _Step(input_ids, positions, logits_indices, None)


def _trial(block_size: int, input_ids: list[int], positions: list[int], blocks: list[int]) -> ForwardBatch:
    """Rows of one token that see themselves alone, each the first of its block."""
    rows = np.arange(len(input_ids))
    tables = np.array(blocks, np.int32)[:, None]
    return ForwardBatch(
        input_ids=np.array(input_ids),
        positions=np.array(positions),
        logits_indices=rows,
        sampled=(),
        prompt_logprobs=(),
        attention=AttentionMetadata(
            query_starts=np.arange(len(rows) + 1, dtype=np.int32),
            context_lens=np.ones(len(rows), np.int32),
            block_tables=tables,
            slot_mapping=np.array(blocks, np.int64) * block_size,
            num_decode_rows=len(rows),
        ),
        lora=None,
    )
