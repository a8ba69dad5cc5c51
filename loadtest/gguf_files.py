"""What llama.cpp's server reads: the base in bfloat16, as we serve it, and the adapters in float16.

The rows of q and k are not put into llama.cpp's rotary order, so its text is not comparable; its speed is. Needs gguf.
"""

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, quants
from safetensors.numpy import load_file

from loadtest.peft_adapters import ALPHA, GGUF_NAMES

_ARCHITECTURE = "llama"
_FILE_TYPE_BF16 = 32


def write_base(source: Path, target: Path) -> Path:
    """Dequantise the matrices of `source` to bfloat16; vectors stay float32."""
    if target.is_file():
        return target
    reader, partial = GGUFReader(source), target.with_suffix(".partial")
    writer = GGUFWriter(partial, _ARCHITECTURE)
    _copy_metadata(reader, writer)
    for tensor in reader.tensors:
        shape = [int(size) for size in reversed(tensor.shape)]
        values = quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape).astype(np.float32)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values)
        else:
            kind = GGMLQuantizationType.BF16
            writer.add_tensor(tensor.name, quants.quantize(values, kind), raw_dtype=kind)
    _finish(writer)
    return partial.rename(target)


def write_adapter(folder: Path, target: Path) -> Path:
    """The PEFT adapter in `folder` as a GGUF LoRA."""
    if target.is_file():
        return target
    partial = target.with_suffix(".partial")
    writer = GGUFWriter(partial, _ARCHITECTURE)
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(ALPHA))
    for name, values in load_file(folder / "adapter_model.safetensors").items():
        module, _, half = name.removeprefix("base_model.model.model.layers.").removesuffix(".weight").rpartition(".")
        layer, _, kind = module.partition(".")
        writer.add_tensor(f"blk.{layer}.{GGUF_NAMES[kind]}.weight.{half.lower()}", values.astype(np.float16))
    _finish(writer)
    return partial.rename(target)


def _copy_metadata(reader: GGUFReader, writer: GGUFWriter) -> None:
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value = _FILE_TYPE_BF16 if field.name == "general.file_type" else field.contents()
        kind = field.types[0]
        writer.add_key_value(field.name, value, kind, field.types[-1] if kind == GGUFValueType.ARRAY else None)


def _finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
