"""One prepared adapter as a file: its flat tensor as memory holds it, and a header that says what it is.

A safetensors file, so that any tool opens it: a tensor `weights`, another `extras` for what is not a low-rank pair
(extras_file.py), and text fields. Two digests tell damage: the data's is a field of the header, and the header's own
comes first in it, over everything that follows. So nothing is parsed, and no memory taken, on the word of a damaged
byte. Knows nothing of folders, locks or how the file gets there.
"""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from sys import intern
from types import MappingProxyType

import torch
import xxhash
from torch import Tensor

from adapters import extras_file
from adapters.adapter_extras import NO_EXTRAS, AdapterExtras
from adapters.adapter_ref import AdapterVersion
from adapters.errors import VersionDamaged
from adapters.host_memory import ALIGNMENT, HostMemory
from adapters.lora_model import LoRAModel, LoRAWeights
from adapters.packed_modules import PackedLayout, PackedModules, layout_of
from adapters.safetensors_header import LENGTH_BYTES

MAX_HEADER_BYTES = 16 << 20
"""A module takes some 60 bytes of it; a loaded adapter has at most 8192."""

_FORMAT = "3"  # of adapters of pairs alone
_WITH_EXTRAS = "4"  # both grow when what is prepared, or how, changes: files of another are as good as damaged
_SEAL = b'{"__metadata__":{"header_sha256":"'  # then 64 digits over what follows them
_SEALED = len(_SEAL) + 64
_PAGE = 4096  # data begin at a multiple of it
_CHUNK = 256 << 10  # bytes read and hashed at once: they stay in a core's own cache
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class VersionFile:
    """What a file of one version holds."""

    header: bytes  # with its length before it
    data: memoryview  # [num_bytes] of the flat tensor, then of the extras
    digest: str  # of the data

    @property
    def num_bytes(self) -> int:
        return len(self.header) + len(self.data)


@dataclass(frozen=True, slots=True)
class _Declared:
    """What a header says of its file."""

    layout: PackedLayout
    dtype: torch.dtype
    digest: str
    features: tuple[str, ...]
    delta_norms: Mapping[str, float] | None
    extras: str | None  # their table


def encode(model: LoRAModel, *, base_key: str) -> VersionFile:
    """The file of `model`; what it holds depends on the model alone, so equal models have equal files."""
    modules, has_extras = packed(model.modules), bool(model.extras)
    data = _bytes_of(_with_extras(modules.flat, model.extras) if has_extras else modules.flat)
    num_weights = modules.flat.numel() * modules.flat.itemsize
    digest = xxhash.xxh3_128_hexdigest(data)
    fields = {
        "format": _WITH_EXTRAS if has_extras else _FORMAT,
        "version": model.version,
        "base_key": base_key,
        "xxh3_128": digest,
        "features": _json(model.features),
        "delta_norms": _json(None if model.delta_norms is None else dict(model.delta_norms)),
        "layout": _layout_text(modules),
    }
    entry = {"dtype": _DTYPE_NAMES[modules.flat.dtype], "shape": [len(modules.flat)], "data_offsets": [0, num_weights]}
    tensors = f'"weights":{_json(entry)}'
    if has_extras:
        fields["extras"] = extras_file.table_of(model.extras)
        rest = {"dtype": "U8", "shape": [len(data) - num_weights], "data_offsets": [num_weights, len(data)]}
        tensors += f',"extras":{_json(rest)}'
    return VersionFile(seal(f'",{_json(fields)[1:]},{tensors}}}'), data, digest)


def seal(text: str) -> bytes:
    """A header, its length before it, of what follows its digest; filled with spaces to a page."""
    tail = text.encode()
    tail += b" " * (-(LENGTH_BYTES + _SEALED + len(tail)) % _PAGE)
    header = _SEAL + hashlib.sha256(tail).hexdigest().encode() + tail
    if len(header) > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {len(header)} bytes is over the limit of {MAX_HEADER_BYTES}")
    return len(header).to_bytes(LENGTH_BYTES, "little") + header


def read_version(
    descriptor: int,
    version: AdapterVersion,
    *,
    base_key: str,
    layout_from: Callable[[str], PackedLayout],
    fingerprint: str = "",
) -> LoRAModel:
    """The model in an open file. Raises VersionDamaged when it is not exactly what `encode` made for that version, or
    when what is in it was computed from base weights that have not this `fingerprint`.

    `layout_from` is `parse_layout`, or a cache before it.
    """
    header, data_bytes = _read_header(descriptor)
    declared = _parse(header, version, base_key, layout_from)
    num_elements, dtype = declared.layout.num_elements, declared.dtype
    num_weights = num_elements * dtype.itemsize
    if num_weights > data_bytes or (declared.extras is None and num_weights != data_bytes):
        raise VersionDamaged(f"it has {data_bytes} bytes of weights, where its header says {num_elements} · {dtype}")
    data = HostMemory(0).empty(data_bytes, dtype=torch.uint8)  # [data_bytes], given back with the adapter
    if _fill(descriptor, _pieces(_bytes_of(data))) != declared.digest:
        raise VersionDamaged("its weights do not have the digest they were stored with")
    modules = PackedModules(declared.layout, data[:num_weights].view(dtype))
    extras = _extras(declared.extras, data[num_weights:], fingerprint)
    return LoRAModel(version, modules, declared.features, declared.delta_norms, extras)


def _extras(table: str | None, memory: Tensor, fingerprint: str) -> AdapterExtras:
    if table is None:
        return NO_EXTRAS
    try:
        extras = extras_file.read_from(table, memory)
    except (AttributeError, LookupError, RecursionError, RuntimeError, TypeError, ValueError) as error:
        raise VersionDamaged(f"its table of extras is not of this program's making ({error!r})") from error
    if extras.base_print not in ("", fingerprint):
        raise VersionDamaged("it was prepared from other weights of the base")
    return extras


def _with_extras(flat: Tensor, extras: AdapterExtras) -> Tensor:
    """The bytes of `flat` and then of the extras, in one mapping that begins at a page."""
    weights = flat.view(torch.uint8)
    data = HostMemory(0).empty(len(weights) + extras_file.num_bytes(extras), dtype=torch.uint8)
    data[: len(weights)] = weights
    extras_file.write_into(extras, data[len(weights) :])
    return data


def is_stored(descriptor: int, file: VersionFile) -> bool:
    """Whether an open file holds exactly these bytes; one that cannot be read does not."""
    try:
        header, data_bytes = _read_header(descriptor)
        if header != file.header[LENGTH_BYTES:] or data_bytes != len(file.data):
            return False
        return _fill(descriptor, _scratch(data_bytes)) == file.digest
    except VersionDamaged:
        return False


def parse_layout(text: str) -> PackedLayout:
    align, shapes = json.loads(text)
    return layout_of(((intern(name), *sizes) for name, *sizes in shapes), align=align)


def packed(modules: Mapping[str, LoRAWeights]) -> PackedModules:
    """The modules as the loader packs them: themselves, if it did."""
    if isinstance(modules, PackedModules):
        dtype, places = modules.flat.dtype, modules.layout.places
        if modules.layout.align * dtype.itemsize == ALIGNMENT:
            return modules
        shapes = [(name, each.lora_rank, each.in_features, each.out_features) for name, each in places.items()]
    else:
        (dtype,) = {tensor.dtype for weights in modules.values() for tensor in (weights.lora_a, weights.lora_b)}
        shapes = [(name, w.lora_rank, w.lora_a.shape[1], w.lora_b.shape[1]) for name, w in modules.items()]
    layout = layout_of(shapes, align=ALIGNMENT // dtype.itemsize)
    ready = PackedModules(layout, HostMemory(0).empty(layout.num_elements, dtype=dtype))
    for name, weights in ready.items():
        weights.lora_a.copy_(modules[name].lora_a)
        weights.lora_b.copy_(modules[name].lora_b)
    return ready


def _layout_text(modules: PackedModules) -> str:
    places = modules.layout.places.items()
    shapes = [[name, place.lora_rank, place.in_features, place.out_features] for name, place in places]
    return _json([ALIGNMENT // modules.flat.dtype.itemsize, shapes])


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _bytes_of(flat: Tensor) -> memoryview:
    """The memory of `flat` [num_elements], which lives as long as the view."""
    return flat.view(torch.uint8).numpy().data


def _read_header(descriptor: int) -> tuple[bytearray, int]:
    """The header and how many bytes follow it, once its seal has been found whole."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise VersionDamaged("it is no file")
    prefix = bytearray(LENGTH_BYTES)
    _fill(descriptor, [memoryview(prefix)])
    length = int.from_bytes(prefix, "little")
    data_bytes = status.st_size - LENGTH_BYTES - length
    if length > MAX_HEADER_BYTES or data_bytes < 0:
        raise VersionDamaged(f"a header of {length} bytes does not fit its {status.st_size}")
    header = bytearray(length)
    _fill(descriptor, [memoryview(header)])
    digest = hashlib.sha256(memoryview(header)[_SEALED:]).hexdigest().encode()
    if header[:_SEALED] != _SEAL + digest:
        raise VersionDamaged("its header does not have the digest it was stored with")
    return header, data_bytes


def _parse(
    header: bytearray, version: AdapterVersion, base_key: str, layout_from: Callable[[str], PackedLayout]
) -> _Declared:
    """What a header says whose seal is whole: some program wrote it so; was it this one, for this base?"""
    try:
        declared = json.loads(header)
        fields = declared["__metadata__"]
        table = fields.get("extras")
        wanted_format = _FORMAT if table is None else _WITH_EXTRAS
        for name, wanted in (("format", wanted_format), ("version", version), ("base_key", base_key)):
            if fields[name] != wanted:
                raise VersionDamaged(f"its {name} is {fields[name]}, where {wanted} was asked for")
        features, norms = json.loads(fields["features"]), json.loads(fields["delta_norms"])
        return _Declared(
            layout_from(fields["layout"]),
            _DTYPES[declared["weights"]["dtype"]],
            fields["xxh3_128"],
            tuple(map(intern, features)),
            None if norms is None else MappingProxyType({intern(kind): norm for kind, norm in norms.items()}),
            table,
        )
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise VersionDamaged(f"its header is not of this program's making ({error!r})") from error


def _fill(descriptor: int, pieces: Iterable[memoryview]) -> str:
    """Read all pieces full, one after the other; the digest of it all. Both let other threads run."""
    digest = xxhash.xxh3_128()
    for piece in pieces:
        while piece:
            count = _read(descriptor, piece)
            digest.update(piece[:count])
            piece = piece[count:]
    return digest.hexdigest()


def _read(descriptor: int, memory: memoryview) -> int:
    try:
        count = os.readv(descriptor, [memory])
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise VersionDamaged(f"the disk cannot read it ({error.strerror})") from error
    if count == 0:
        raise VersionDamaged("it ends too early")
    return count


def _pieces(memory: memoryview) -> Iterator[memoryview]:
    for begin in range(0, len(memory), _CHUNK):
        yield memory[begin : begin + _CHUNK]


def _scratch(num_bytes: int) -> Iterator[memoryview]:
    """Pieces as of `num_bytes` of memory, all at one place."""
    memory = memoryview(bytearray(min(num_bytes, _CHUNK)))
    for begin in range(0, num_bytes, _CHUNK):
        yield memory[: num_bytes - begin]
