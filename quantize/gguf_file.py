"""GGUF files as tables of tensors: plain floats where they lie, quantized ones block by block as they are read."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowvram_kernels.errors import CheckpointError
from lowvram_quantize.gguf_parts import open_parts, stated
from lowvram_quantize.source import TensorRef, TensorTable

Tensor = torch.Tensor

# GGML knows 4 dimensions: ComfyUI-GGUF's converter flattens some tensors and notes their shapes under this name.
_SHAPE_NOTE = "comfy.gguf.orig_shape."
_PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GgufRef(TensorRef):
    """A tensor in blocks of ``block`` values, ``block_nbytes`` bytes each; ``dtype`` is float32."""

    quant: str
    block: int
    block_nbytes: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.block * self.block_nbytes

    @property
    def kind(self) -> str:
        return f"GGUF {self.quant}"

    def read_rows(self, start: int, count: int) -> Tensor:
        from gguf import GGMLQuantizationType, dequantize

        width = math.prod(self.shape[1:])
        begin, end = start * width, (start + count) * width
        # A tensor that was flattened for its blocks may have rows that begin within one.
        first, last = begin // self.block, -(-end // self.block)
        raw = self.read_bytes(first * self.block_nbytes, (last - first) * self.block_nbytes)
        # As one row: the package calls its function again for every 16 rows, which for rows of one block took seven
        # times as long in Q8_0 and twice in Q4_K.
        values = dequantize(raw.reshape(1, -1), GGMLQuantizationType[self.quant]).reshape(-1)
        skip = begin - first * self.block
        return torch.from_numpy(np.ascontiguousarray(values[skip : skip + end - begin])).view(count, width)


def open_gguf(path: Path) -> TensorTable:
    """The tensors of a GGUF file, or of all parts of a split one of which ``path`` is any, under its own names, with
    shapes in torch's order.

    Raises:
        CheckpointError: truncated, damaged, a part is missing, or of a type that the ``gguf`` package does not
            dequantize.
    """
    readers = open_parts(path)
    table: TensorTable = {}
    for file, reader in readers.items():
        if reader.byte_order == "S":
            raise CheckpointError(f"{file} is a GGUF file of the other byte order; fetch the usual one")
        size = file.stat().st_size
        for tensor in reader.tensors:
            end = int(tensor.data_offset) + int(tensor.n_bytes)
            if end > size:
                raise CheckpointError(
                    f"{file} is truncated: {tensor.name} would end at byte {end} of {size}; fetch it again"
                )
            name = str(tensor.name)
            if name in table:
                raise CheckpointError(f"{table[name].file} and {file} both hold {name}; fetch all parts again")
            table[name] = _ref(file, stated(readers, _SHAPE_NOTE + name), tensor)
    return table


def architecture_of(path: Path) -> str:
    """What a GGUF file says it holds, as "wan", "t5encoder", "flux" or "llama"."""
    return str(stated(open_parts(path), "general.architecture"))


def _ref(path: Path, noted: Any, tensor: Any) -> TensorRef:
    from gguf import GGML_QUANT_SIZES

    name, quant = str(tensor.name), tensor.tensor_type
    shape = tuple(int(n) for n in (noted if noted is not None else reversed(tensor.shape.tolist())))
    values = math.prod(int(n) for n in tensor.shape.tolist())
    if math.prod(shape) != values:
        raise CheckpointError(f"{path}: {name} has {values} values, its noted shape is {list(shape)}; fetch it again")
    where: dict[str, Any] = {"name": name, "shape": shape, "file": path, "offset": int(tensor.data_offset)}
    if quant.name in _PLAIN:
        return TensorRef(dtype=_PLAIN[quant.name], **where)
    block, block_nbytes = GGML_QUANT_SIZES[quant]
    ref = GgufRef(dtype=torch.float32, quant=quant.name, block=block, block_nbytes=block_nbytes, **where)
    _check_readable(ref)
    return ref


def _check_readable(ref: GgufRef) -> None:
    from gguf import GGMLQuantizationType, dequantize

    try:
        dequantize(np.zeros((1, ref.block_nbytes), np.uint8), GGMLQuantizationType[ref.quant])
    except NotImplementedError as error:
        raise CheckpointError(
            f"{ref.file}: {ref.name} is of type {ref.quant}, which is not dequantized; fetch an edition in Q8_0, Q6_K, "
            "Q5_K_M, Q4_K_M or bf16"
        ) from error
