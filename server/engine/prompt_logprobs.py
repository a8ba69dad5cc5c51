"""Log probabilities of prompts, collected over the steps in which a prompt is computed. Knows no model."""

import math

from torch import Tensor

from server.engine.forward_batch import ForwardBatch
from server.engine.request import TokenLogprob
from server.engine.sampler import Sampler
from server.engine.scheduler_output import SchedulerOutput


class PromptLogprobs:
    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self._by_request: dict[str, list[TokenLogprob | None]] = {}

    def collect(self, batch: ForwardBatch, logits: Tensor) -> list[str]:
        """Keep what this step tells of prompts; the ids of requests whose logits are not finite."""
        broken = []
        for rows in batch.prompt_logprobs:
            found = self._sampler.prompt_logprobs(logits[rows.begin : rows.end], rows.next_token_ids, rows.request)
            # The first token has no logprob: nothing precedes it.
            self._by_request.setdefault(rows.request.request_id, [None]).extend(found)
            if any(math.isnan(each.logprob) for each in found):
                broken.append(rows.request.request_id)
        return broken

    def take_finished(self, scheduled: SchedulerOutput) -> dict[str, tuple[TokenLogprob | None, ...]]:
        """Those of the requests whose prompt ends in this step."""
        finished = {}
        for row in scheduled.rows:
            request = row.request
            wants = request.sampling_params.prompt_logprobs is not None and not request.output_token_ids
            if wants and request.num_computed_tokens + row.num_new_tokens >= request.num_prompt_tokens:
                finished[request.request_id] = tuple(self._by_request.pop(request.request_id, [None]))
        return finished

    def forget(self, request_id: str) -> None:
        """The request ended, or computes its prompt again."""
        self._by_request.pop(request_id, None)
