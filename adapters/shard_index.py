"""The index of a sharded adapter: which safetensors file beside it holds which tensor. Knows no headers and no data.

No torch here: what only sends an adapter elsewhere reads the index as well.
"""

from adapters.adapter_folder import AdapterFolder
from adapters.errors import AdapterRefused, RefusalCode
from adapters.untrusted_json import parse_object, shown

MAX_INDEX_BYTES = 6 << 20
"""A line holds a tensor's name and a file's: 384 bytes for each of as many tensors as a header may have."""
MAX_SHARDS = 64


def shard_names(folder: AdapterFolder) -> list[str]:
    """The files of a sharded adapter, from its index alone. Raises AdapterRefused (adapter_corrupt, too_large)."""
    return sorted(set(read_index(folder).values()))


def read_index(folder: AdapterFolder) -> dict[str, str]:
    """tensor → file name. Raises AdapterRefused (adapter_corrupt, adapter_too_large)."""
    with folder.open(folder.weights) as file:
        if file.num_bytes > MAX_INDEX_BYTES:
            raise _too_large(f"{file.name} has {file.num_bytes} bytes, over the limit of {MAX_INDEX_BYTES}")
        table = parse_object(file.read(file.num_bytes), what=file.name).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise _corrupt(f"{folder.weights} has no weight_map")
    index: dict[str, str] = {}
    for name, shard in table.items():
        if not isinstance(shard, str) or "/" in shard or "\0" in shard or not shard.endswith(".safetensors"):
            raise _corrupt(f"{folder.weights} places it in {shown(shard)}, not a safetensors file beside it", name)
        index[name] = shard
    if len(set(index.values())) > MAX_SHARDS:
        raise _too_large(f"{folder.weights} names {len(set(index.values()))} shards, over the limit of {MAX_SHARDS}")
    return index


def _too_large(why: str) -> AdapterRefused:
    return AdapterRefused(RefusalCode.TOO_LARGE, why, "Save the LoRA tensors alone, in fewer files")


def _corrupt(why: str, tensor: str | None = None) -> AdapterRefused:
    fix = "The files do not belong together: copy or save them again"
    return AdapterRefused(RefusalCode.CORRUPT, why, fix, tensor=None if tensor is None else shown(tensor))
