"""How attention's metadata lies in a device step: its GPU batch as a part that DeviceStep stages. Runs no kernel."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from server.engine.attention import gpu_batch
from server.engine.attention.gpu_batch import AttentionCaps, GPUAttentionBatch
from server.engine.attention.interface import AttentionMetadata
from server.engine.device_step import Words

_TABLE_STEP = 16  # blocks; tables of few different widths let kernels meet few different strides


@dataclass(frozen=True, slots=True)
class AttentionStaging:
    max_blocks: int  # of one row's block table, for buckets

    def bucket(self, num_rows: int) -> AttentionCaps:
        return AttentionCaps(num_tokens=num_rows, num_rows=num_rows, max_blocks=self.max_blocks, is_decode=True)

    def exact(self, batch: AttentionMetadata) -> AttentionCaps:
        num_rows, max_blocks = batch.block_tables.shape
        return AttentionCaps(
            num_tokens=len(batch.slot_mapping),
            num_rows=num_rows,
            max_blocks=-(-max_blocks // _TABLE_STEP) * _TABLE_STEP,
            is_decode=batch.num_decode_rows == num_rows,
        )

    def layout(self, caps: AttentionCaps) -> Mapping[str, int]:
        return gpu_batch.layout(caps)

    def fill(self, views: Mapping[str, Words], batch: AttentionMetadata, caps: AttentionCaps) -> None:
        gpu_batch.fill(views, batch, caps)

    def from_device(self, views: Mapping[str, Tensor], caps: AttentionCaps) -> GPUAttentionBatch:
        return gpu_batch.from_device(views, caps)
