"""One step as arrays: from the scheduler's rows to what the model, attention and LoRA layers read.

All sequences lie end to end in one packed row of `num_tokens` tokens with explicit positions. Knows the model's
inputs but not the model; everything is numpy until the runner moves it to the device.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adapters.adapter_ref import AdapterUse
from adapters.extras_batch import ExtrasBatch
from adapters.lora_batch import LoRABatch, RowRanges
from server.engine.attention.interface import AttentionMetadata
from server.engine.request import Request
from server.engine.scheduler_output import PENDING_TOKEN_ID, ScheduledRow

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLogprobRows:
    """Where in `logits_indices` the rows of one request's prompt logprobs lie, and the tokens that came next."""

    request: Request
    begin: int  # of logits rows, half-open [begin, end)
    end: int
    next_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """The arrays of one step. `logits_indices` first names the rows to sample (in the order of `sampled`),
    then the positions whose logits serve prompt logprobs. Where `carried` is not -1, the token is the one that row
    of the step before sampled, known to the device alone; None where all are known."""

    input_ids: IntArray  # [num_tokens], 0 where carried
    positions: IntArray  # [num_tokens]
    logits_indices: IntArray  # [num_logits] indices into the packed tokens
    sampled: tuple[Request, ...]
    prompt_logprobs: tuple[PromptLogprobRows, ...]
    attention: AttentionMetadata
    lora: LoRABatch | None
    carried: IntArray | None = None  # [num_tokens]
    extras: ExtrasBatch | None = None  # what adapters have beside low-rank pairs of linears (forward_extras.py)

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)


def build_forward_batch(
    rows: Sequence[ScheduledRow],
    block_size: int,
    row_ranges: Callable[[tuple[AdapterUse, ...]], RowRanges],
    pending: Mapping[str, int] | None = None,
) -> ForwardBatch:
    """Pack `rows`, the decode rows first; `row_ranges` says where a request's adapters stand in the pools this step.

    What belongs to a prompt goes through the kernels for prompts, even a single token left by a prefix hit: kernels
    differ in the last bit, and a request's tokens must not depend on what happened to be cached.

    `pending`: of requests whose last token is PENDING_TOKEN_ID, which row of the step under way samples it."""
    rows = sorted(rows, key=_is_prompt)
    counts = np.array([row.num_new_tokens for row in rows], np.int32)
    starts = np.array([row.request.num_computed_tokens for row in rows], np.int32)
    query_starts = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(counts, out=query_starts[1:])
    offsets = np.arange(query_starts[-1], dtype=np.int64)
    row_of_token = np.repeat(np.arange(len(rows)), counts)
    positions = offsets - query_starts[:-1][row_of_token] + starts[row_of_token]
    tables = _pad_tables([row.request.block_table for row in rows])
    blocks = tables[row_of_token, positions // block_size].astype(np.int64)
    sampled, prompt_rows, indices = _logits_rows(rows, query_starts)
    input_ids, carried = _new_token_ids(rows), None
    if pending:
        input_ids, carried = _carry(input_ids, row_of_token, rows, pending)
    return ForwardBatch(
        input_ids=input_ids,
        positions=positions,
        logits_indices=np.array(indices, np.int64),
        sampled=sampled,
        prompt_logprobs=prompt_rows,
        attention=AttentionMetadata(
            query_starts=query_starts,
            context_lens=starts + counts,
            block_tables=tables,
            slot_mapping=blocks * block_size + positions % block_size,
            num_decode_rows=sum(not _is_prompt(row) for row in rows),
        ),
        lora=_lora_batch(rows, row_ranges),
        carried=carried,
    )


def _lora_batch(
    rows: Sequence[ScheduledRow], row_ranges: Callable[[tuple[AdapterUse, ...]], RowRanges]
) -> LoRABatch | None:
    """The adapters of each token. A row is cut where one of its adapters begins to act."""
    counts: list[int] = []
    ranges: list[RowRanges] = []
    is_prompt: list[bool] = []
    for row in rows:
        for count, uses in _pieces(row):
            counts.append(count)
            ranges.append(row_ranges(uses))
            is_prompt.append(_is_prompt(row))
    return LoRABatch.build(counts, ranges, is_prompt=is_prompt)


def _pieces(row: ScheduledRow) -> list[tuple[int, tuple[AdapterUse, ...]]]:
    """The row's new tokens as runs, each with the adapters that act on it."""
    begin = row.request.num_computed_tokens
    end, uses = begin + row.num_new_tokens, row.request.adapters
    borders = sorted({use.active_from for use in uses if begin < use.active_from < end})
    if not borders and all(use.active_from <= begin for use in uses):  # nearly every row
        return [(row.num_new_tokens, uses)]
    starts, ends = [begin, *borders], [*borders, end]
    return [
        (after - first, tuple(use for use in uses if use.active_from <= first))
        for first, after in zip(starts, ends, strict=True)
    ]


def _new_token_ids(rows: Sequence[ScheduledRow]) -> IntArray:
    ids: list[int] = []
    for row in rows:
        begin = row.request.num_computed_tokens
        ids.extend(row.request.token_ids(begin, begin + row.num_new_tokens))
    return np.array(ids, np.int64)


def _carry(
    input_ids: IntArray, row_of_token: IntArray, rows: Sequence[ScheduledRow], pending: Mapping[str, int]
) -> tuple[IntArray, IntArray]:
    """The ids with 0 for those not known yet, and the row of the step before that samples each of these."""
    carried = np.full(len(input_ids), -1, np.int64)
    for token in np.flatnonzero(input_ids == PENDING_TOKEN_ID).tolist():
        carried[token] = pending[rows[row_of_token[token]].request.request_id]
    return np.where(carried < 0, input_ids, 0), carried


def _pad_tables(tables: Sequence[Sequence[int]]) -> npt.NDArray[np.int32]:
    padded = np.zeros((len(tables), max(map(len, tables))), np.int32)
    for i, table in enumerate(tables):
        padded[i, : len(table)] = table
    return padded


def _is_prompt(row: ScheduledRow) -> bool:
    """Whether a row has tokens of its prompt, or several at once as after a preemption; else it is a decode row."""
    return row.num_new_tokens > 1 or row.request.num_computed_tokens < row.request.num_prompt_tokens


def _logits_rows(
    rows: Sequence[ScheduledRow], query_starts: npt.NDArray[np.int32]
) -> tuple[tuple[Request, ...], tuple[PromptLogprobRows, ...], list[int]]:
    """Which packed tokens need logits: the last token of each row that samples, then prompt positions asked for."""
    sampled = tuple(row.request for row in rows if row.samples)
    indices = [int(query_starts[i + 1]) - 1 for i, row in enumerate(rows) if row.samples]
    prompt_rows = []
    for i, row in enumerate(rows):
        request, begin = row.request, row.request.num_computed_tokens
        # Logits at position p predict token p + 1, so the last prompt position belongs to sampling.
        end = min(begin + row.num_new_tokens, request.num_prompt_tokens - 1)
        if request.sampling_params.prompt_logprobs is None or begin >= end:
            continue
        first = len(indices)
        indices.extend(range(int(query_starts[i]), int(query_starts[i]) + end - begin))
        next_ids = request.prompt_token_ids[begin + 1 : end + 1]
        prompt_rows.append(PromptLogprobRows(request=request, begin=first, end=len(indices), next_token_ids=next_ids))
    return sampled, tuple(prompt_rows), indices
