"""The safetensors files of one adapter held open, one file or shards: their headers as bytes, not yet parsed.

When `open_weights` returns, the bytes are within the limit and every header fits its file. Knows nothing of what the
headers say (header_table.py) or of what the tensors mean.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from adapters.adapter_folder import AdapterFolder, OpenFile
from adapters.errors import AdapterRefused, RefusalCode
from adapters.safetensors_header import LENGTH_BYTES, header_length
from adapters.shard_index import read_index


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """`headers`: the JSON of each file; `index`: tensor → file name, of a sharded adapter."""

    files: tuple[OpenFile, ...]
    headers: tuple[bytes, ...]
    index: Mapping[str, str] | None = None

    def digest(self) -> bytes:
        """Of all that says which tensors there are and where: headers, sizes and the index."""
        digest = hashlib.sha256()
        for file, header in zip(self.files, self.headers, strict=True):
            digest.update(f"{file.name} {file.num_bytes} {len(header)}\n".encode())
            digest.update(header)
        for name, shard in sorted((self.index or {}).items()):
            digest.update(f"{name} in {shard}\n".encode("utf-8", "surrogatepass"))
        return digest.digest()


@contextmanager
def open_weights(folder: AdapterFolder, *, max_bytes: int) -> Iterator[WeightFiles]:
    """All files, in the order of their names, held open meanwhile. Raises AdapterRefused (adapter_corrupt,
    adapter_too_large)."""
    with ExitStack() as stack:
        index = read_index(folder) if folder.is_sharded else None
        names = sorted(set(index.values())) if index is not None else [folder.weights]
        files = tuple(stack.enter_context(folder.open(name)) for name in names)
        _check_size(sum(file.num_bytes for file in files), max_bytes)
        yield WeightFiles(files, tuple(map(_read_header, files)), index)


def _read_header(file: OpenFile) -> bytes:
    length = header_length(file.read(LENGTH_BYTES), file_bytes=file.num_bytes, what=file.name)
    return file.read(length, LENGTH_BYTES)


def _check_size(num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        why = f"the adapter's weights take {num_bytes} bytes, over max_adapter_bytes={max_bytes}"
        fix = f"Restart with --max-adapter-bytes {num_bytes} or more"
        raise AdapterRefused(RefusalCode.TOO_LARGE, why, fix, feature="max_adapter_bytes")
