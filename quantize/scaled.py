"""Weights in 8 bit that are stored beside their scales: read as ``values * scale`` in float32.

Where each spelling comes from:
    X.scale_weight, X.scale_input, a tensor "scaled_fp8"    ComfyUI's scaled fp8, also written by musubi-tuner
    X.weight_scale, X.input_scale, X.comfy_quant            ComfyUI's later form; without the last also ModelOpt's,
                                                            compressed-tensors' and lightx2v's
    X.weight_scale_inv                                      DeepSeek-V3's and transformers' fine-grained fp8, blocks of
                                                            128 x 128; in spite of its name it is multiplied with
    X.weight._data, X.weight._scale, X.output_scale         optimum-quanto's
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import torch

from lowvram_kernels.errors import CheckpointError
from lowvram_quantize.source import TensorRef, TensorTable

Tensor = torch.Tensor

BLOCK = 128
MARKERS = ("scaled_fp8",)
"""Tensors that only say how the others are stored."""
_SCALES = {".scale_weight": ".weight", ".weight_scale": ".weight", ".weight_scale_inv": ".weight", "._scale": ""}
# Scales of activations that were measured beforehand: here activations are quantized by what they are.
_UNUSED = (".scale_input", ".input_scale", ".scale_output", ".output_scale")
_COMFY = ".comfy_quant"
_COMFY_FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")
# Weights that are packed, so that neither shape nor dtype is that of the layer.
_PACKED = {
    ".weight_scale_2": "4 bit in blocks (nvfp4)",
    ".qweight": "packed integers (GPTQ, AWQ or Nunchaku)",
    ".weight.absmax": "bitsandbytes' 4 bit",
    ".weight.SCB": "bitsandbytes' 8 bit",
    ".weight_packed": "packed integers (compressed-tensors)",
}
_ADVICE = "fetch its bf16, fp8 or GGUF edition"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaledRef(TensorRef):
    """``raw``, times ``scale``: one number, one a row, or one for each block of 128 x 128. ``dtype`` is float32."""

    raw: TensorRef
    scale: TensorRef
    spelling: str

    @property
    def nbytes(self) -> int:
        return self.raw.nbytes

    @property
    def kind(self) -> str:
        return f"{self.raw.kind} times {self.spelling}"

    @property
    def scales(self) -> tuple[TensorRef, ...]:
        return (self.scale,)

    def read_rows(self, start: int, count: int) -> Tensor:
        values = self.raw.read_rows(start, count).float()
        if math.prod(self.scale.shape) == 1:
            return values.mul_(self.scale.read().float().reshape(()))
        if self.scale.rows == self.rows:
            return values.mul_(self.scale.read_rows(start, count).float())
        first, last = start // BLOCK, -(-(start + count) // BLOCK)
        blocks = self.scale.read_rows(first, last - first).float().repeat_interleave(BLOCK, 0)
        skip = start - first * BLOCK
        wide = blocks[skip : skip + count].repeat_interleave(BLOCK, 1)
        return values.mul_(wide[:, : values.shape[1]])


def with_scales(path: Path, table: TensorTable) -> TensorTable:
    """The table with weights and their scales put together, and without what only described them.

    Raises:
        CheckpointError: a scale without a weight or of a shape that is not known, or weights that are packed.
    """
    _refuse_packed(path, table)
    layers, found = dict(table), {}
    for name, ref in table.items():
        if name.endswith(_COMFY):
            _check_comfy(path, name, ref)
        weight = _weight_of(name)
        if weight is not None:
            if weight in found:
                raise CheckpointError(f"{path} has two scales for {weight}; expected one: {_ADVICE}")
            found[weight] = ref
        if weight is not None or name.endswith((*_UNUSED, _COMFY)) or name.rpartition(".")[2] in MARKERS:
            del layers[name]
    for weight, scale in found.items():
        stored = f"{weight}._data" if f"{weight}._data" in layers else weight
        if stored not in layers:
            raise CheckpointError(f"{path} has {scale.name}, but no {weight} that it belongs to; fetch it again")
        layers[weight] = _scaled(path, weight, layers.pop(stored), scale)
    return layers


def _weight_of(name: str) -> str | None:
    for suffix, own in _SCALES.items():
        if name.endswith(suffix):
            return name.removesuffix(suffix) + own
    return None


def _scaled(path: Path, name: str, raw: TensorRef, scale: TensorRef) -> ScaledRef:
    rows, width = raw.rows, math.prod(raw.shape[1:])
    numbers = math.prod(scale.shape)
    by_row = numbers == rows and scale.rows == rows
    by_block = len(raw.shape) == 2 and scale.shape == (-(-rows // BLOCK), -(-width // BLOCK))
    if numbers != 1 and not by_row and not by_block:
        raise CheckpointError(
            f"{path}: {scale.name} {list(scale.shape)} does not fit {name} {list(raw.shape)}; expected one number, one "
            f"a row, or one for each block of {BLOCK} x {BLOCK}: {_ADVICE}"
        )
    spelling = scale.name.rpartition(".")[2]
    return ScaledRef(
        name=raw.name, dtype=torch.float32, shape=raw.shape, file=raw.file, offset=raw.offset, raw=raw, scale=scale,
        spelling=spelling,
    )  # fmt: skip


def _refuse_packed(path: Path, table: TensorTable) -> None:
    for name in table:
        for suffix, what in _PACKED.items():
            if name.endswith(suffix):
                raise CheckpointError(f"{path} is stored as {what}, as {name} shows, which is not read; {_ADVICE}")


def _check_comfy(path: Path, name: str, ref: TensorRef) -> None:
    """The JSON that ComfyUI writes beside a layer names its format."""
    try:
        facts = json.loads(bytes(ref.read_bytes(0, min(ref.nbytes, 1 << 16))))
        known = facts["format"].startswith(_COMFY_FORMATS)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: {name} holds no JSON with a format; fetch it again") from error
    if not known:
        raise CheckpointError(
            f"{path}: {name} says {facts['format']!r}; read are {', '.join(_COMFY_FORMATS)}: {_ADVICE}"
        )
