"""What a step's adapters have beside low-rank pairs of linears, put into its arrays. Knows nothing of tensors."""

from dataclasses import replace

import numpy as np

from adapters.extra_layers import ExtraLayers
from server.engine.forward_batch import ForwardBatch


def with_extras(batch: ForwardBatch, layers: ExtraLayers, *, keeps_logits: bool) -> ForwardBatch:
    """`batch` itself when none of its adapters has any. `keeps_logits`: the head sees the tokens of `logits_indices`
    alone.

    Ids that the base's embedding does not have are kept apart, since its own lookup would fail at them.
    """
    head_rows = batch.logits_indices if keeps_logits else np.arange(batch.num_tokens)
    extras = layers.batch_of(batch.lora, batch.input_ids, head_rows)
    if extras is None:
        return batch
    input_ids = batch.input_ids
    if extras.foreign_ids:
        input_ids = input_ids.copy()
        input_ids[[token for token, _ in extras.foreign_ids]] = 0
    return replace(batch, input_ids=input_ids, extras=extras)
