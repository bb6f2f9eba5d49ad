"""Weights in 8 bit that are stored beside their scales: read as ``values * scale`` in float32.

Where each spelling comes from:
    X.scale_weight, X.scale_input, a tensor "scaled_fp8"    ComfyUI's scaled fp8, also written by musubi-tuner
    X.weight_scale, X.input_scale                           ComfyUI's later form, which also says its formats (see
                                                            layer_formats); ModelOpt's, compressed-tensors', lightx2v's
    X.weight_scale_inv                                      DeepSeek-V3's and transformers' fine-grained fp8, blocks of
                                                            128 x 128; in spite of its name it is multiplied with
    X.weight._data, X.weight._scale, X.output_scale         optimum-quanto's
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import re
from pathlib import Path

import torch

from lowvram_kernels.errors import CheckpointError
from lowvram_quantize.layer_formats import ADVICE, BESIDE, BLOCK, Stored, layer_formats
from lowvram_quantize.source import TensorRef, TensorTable

Tensor = torch.Tensor
log = logging.getLogger(__name__)

MARKERS = ("scaled_fp8",)
"""Tensors that only say how the others are stored."""
_SCALES = {".scale_weight": ".weight", ".weight_scale": ".weight", ".weight_scale_inv": ".weight", "._scale": ""}
_SCALES_OF_CODES = {".weight.scale": ".weight", ".scale": ".weight", "_scale": ""}
_CODES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8)
_LIKE_A_SCALE = re.compile(r"(?P<layer>.+)[._][^.]*(?:scale|zero|absmax|amax)[^.]*")
# Scales of activations that were measured beforehand: here activations are quantized by what they are.
_UNUSED = (".scale_input", ".input_scale", ".scale_output", ".output_scale")
# Weights that are packed, so that neither shape nor dtype is that of the layer.
_PACKED = {
    ".weight_scale_2": "4 bit in blocks (nvfp4)",
    ".qweight": "packed integers (GPTQ, AWQ or Nunchaku)",
    ".weight.absmax": "bitsandbytes' 4 bit",
    ".weight.SCB": "bitsandbytes' 8 bit",
    ".weight_packed": "packed integers (compressed-tensors)",
    ".weight_codebook": "4 bit with a code book (w4a8)",
    ".weight_zero_point": "integers with zero points",
    ".pre_quant_scale": "weights that were smoothed (AWQ)",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaledRef(TensorRef):
    """``raw``, times ``scale``: one number, one a row, or one for each square of ``block``. ``dtype`` is float32."""

    raw: TensorRef
    scale: TensorRef
    spelling: str
    block: int = BLOCK

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
            return values.mul_(self._checked(self.scale.read()).reshape(()))
        if self.scale.rows == self.rows:
            return values.mul_(self._checked(self.scale.read_rows(start, count)))
        first, last = start // self.block, -(-(start + count) // self.block)
        blocks = self._checked(self.scale.read_rows(first, last - first)).repeat_interleave(self.block, 0)
        skip = start - first * self.block
        wide = blocks[skip : skip + count].repeat_interleave(self.block, 1)
        return values.mul_(wide[:, : values.shape[1]])

    def _checked(self, scale: Tensor) -> Tensor:
        scale = scale.float()
        if not bool(((scale >= 0) & (scale < math.inf)).all()):  # NaN is neither
            raise CheckpointError(
                f"{self.scale.file}: {self.scale.name} is negative, NaN or infinite; expected scales: fetch it again"
            )
        return scale


def with_scales(path: Path, table: TensorTable) -> TensorTable:
    """The table with weights and their scales put together, and without what only described them.

    Raises:
        CheckpointError: a scale without a weight or of a shape that is not known, weights that are packed, or a format
            that is stated and not read.
    """
    formats = layer_formats(path, table)
    _refuse_packed(path, table)
    layers, found, unused = dict(table), {}, []
    for name, ref in table.items():
        weight = _weight_of(name, table)
        if weight is not None:
            if weight in found:
                raise CheckpointError(f"{path} has two scales for {weight}; expected one: {ADVICE}")
            found[weight] = ref
        unused += [name] if name.endswith(_UNUSED) else []
        if weight is not None or name.endswith((*_UNUSED, BESIDE)) or name.rpartition(".")[2] in MARKERS:
            del layers[name]
    for weight, scale in found.items():
        stored = f"{weight}._data" if f"{weight}._data" in layers else weight
        if stored not in layers:
            raise CheckpointError(f"{path} has {scale.name}, but no {weight} that it belongs to; fetch it again")
        layers[weight] = _scaled(path, weight, _codes(path, layers.pop(stored), formats.get(weight)), scale, formats)
    _refuse_unknown(path, layers)
    for weight in formats.keys() - found.keys():
        raise CheckpointError(f"{path} says {formats[weight].format!r} of {weight}, but has no scale of it; {ADVICE}")
    if unused:
        _say_unused(path, len(unused), unused[0])
    return layers


@functools.lru_cache  # a file is opened to see what it holds, and again to read it
def _say_unused(path: Path, count: int, example: str) -> None:
    log.warning(
        "%s: %d scales of activations are not used, as %s: they are quantized by what they are", path, count, example
    )


def _codes(path: Path, raw: TensorRef, stored: Stored | None) -> TensorRef:
    """The tensor that is scaled, as what it is said to be: fp8 may lie in a container of bytes."""
    if stored is None:
        if not raw.dtype.is_floating_point and raw.dtype is not torch.int8:
            raise CheckpointError(
                f"{path}: {raw.name} is {raw.kind} beside a scale, and nothing says what its bytes mean; {ADVICE}"
            )
        return raw
    if raw.dtype is torch.uint8 and stored.dtype is not torch.int8:
        return dataclasses.replace(raw, dtype=stored.dtype)
    if raw.dtype is not stored.dtype:
        raise CheckpointError(f"{path} says {stored.format!r} of {raw.name}, which is {raw.kind}; {ADVICE}")
    return raw


def _weight_of(name: str, table: TensorTable) -> str | None:
    """What a tensor is the scale of; names that are also other things are scales only beside codes."""
    for suffix, own in _SCALES.items():
        if name.endswith(suffix):
            return name.removesuffix(suffix) + own
    for suffix, own in _SCALES_OF_CODES.items():
        weight = name.removesuffix(suffix) + own
        if name.endswith(suffix) and weight in table and table[weight].dtype in _CODES:
            return weight
    return None


def _refuse_unknown(path: Path, layers: TensorTable) -> None:
    """A tensor beside codes that is called as if it belonged to them: guessed at, or left out, it would give noise."""
    for name in layers:
        match = _LIKE_A_SCALE.fullmatch(name)
        for weight in (match["layer"], f"{match['layer']}.weight") if match else ():
            if weight in layers and layers[weight].dtype in _CODES:
                raise CheckpointError(
                    f"{path} has {name} beside {weight} in {layers[weight].kind}, and how it scales it is not known; "
                    f"{ADVICE}"
                )


def _scaled(path: Path, name: str, raw: TensorRef, scale: TensorRef, formats: dict[str, Stored]) -> ScaledRef:
    rows, width = raw.rows, math.prod(raw.shape[1:])
    numbers = math.prod(scale.shape)
    block = formats[name].block if name in formats else BLOCK
    by_row = numbers == rows and scale.rows == rows
    by_block = len(raw.shape) == 2 and scale.shape == (-(-rows // block), -(-width // block))
    if numbers != 1 and not by_row and not by_block:
        raise CheckpointError(
            f"{path}: {scale.name} {list(scale.shape)} does not fit {name} {list(raw.shape)}; expected one number, one "
            f"a row, or one for each block of {block} x {block}: {ADVICE}"
        )
    if not scale.dtype.is_floating_point:
        raise CheckpointError(
            f"{path}: {scale.name} is {scale.kind}; expected a scale in a float's dtype, and not codes as of mxfp8: "
            f"{ADVICE}"
        )
    spelling = scale.name.rpartition(".")[2]
    return ScaledRef(
        name=raw.name, dtype=torch.float32, shape=raw.shape, file=raw.file, offset=raw.offset, raw=raw, scale=scale,
        spelling=spelling, block=block,
    )  # fmt: skip


def _refuse_packed(path: Path, table: TensorTable) -> None:
    for name in table:
        for suffix, what in _PACKED.items():
            if name.endswith(suffix):
                raise CheckpointError(f"{path} is stored as {what}, as {name} shows, which is not read; {ADVICE}")
