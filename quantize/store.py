"""One tensor from its source into the artifact: read a few rows, merge the LoRA, rotate, quantize, write."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from lowvram_kernels.rotation import rotated
from lowvram_quantize.components import Item
from lowvram_quantize.format import SMOOTH_SCALE
from lowvram_quantize.lora_updates import Update
from lowvram_quantize.schemes import CHUNK_VALUES, NF4_BLOCK, all_finite, not_finite, quantize_chunk
from lowvram_quantize.slabs import TensorSpec

Tensor = torch.Tensor
# Writes values at a byte offset of the stored tensor of that name.
Write = Callable[[str, int, Tensor], None]

# Chunks that a LoRA is merged into at once: a product of 51 rows by 5120 ran at 77 GFLOP/s on one core of an EPYC with
# AVX-512, one of 204 rows at 87.
_MERGED_CHUNKS = 4


def stored_specs(item: Item) -> list[TensorSpec]:
    """What an item is stored as: its values and, quantized, their scales and the factors of its inputs."""
    name, shape, scheme = item.name, item.ref.shape, item.scheme
    if scheme.kind == "kept":
        return [TensorSpec(name=name, dtype=scheme.dtype, shape=shape, channels_last=item.channels_last)]
    if scheme.kind == "rows":
        specs = [
            TensorSpec(name=name, dtype=scheme.dtype, shape=shape, channels_last=item.channels_last),
            TensorSpec(name=f"{name}_scale", dtype=torch.float32, shape=shape[:1]),
        ]
        factors = TensorSpec(name=_factors_name(name), dtype=torch.bfloat16, shape=shape[1:])
        return [*specs, factors] if scheme.smooth else specs
    if scheme.kind == "quanto":
        return [
            TensorSpec(name=f"{name}._data", dtype=scheme.dtype, shape=shape),
            TensorSpec(name=f"{name}._scale", dtype=torch.float32, shape=(shape[0], 1)),
        ]
    values = math.prod(shape)
    return [
        TensorSpec(name=name, dtype=torch.uint8, shape=(-(-values // 2), 1)),
        TensorSpec(name=f"{name}.absmax", dtype=torch.float32, shape=(-(-values // NF4_BLOCK),)),
    ]


def _factors_name(name: str) -> str:
    return name.removesuffix("weight") + SMOOTH_SCALE


def write_item(item: Item, delta: Update | None, write: Write, factors: Tensor | None = None) -> float | None:
    """Convert and write one tensor; returns its relative error (norm) where it was quantized: of what is multiplied by
    the inputs as they are smoothed and rotated.

    Args:
        factors: what its inputs are to be multiplied by, [K] powers of two; given where its scheme says so.

    Raises:
        CheckpointError: a value is NaN or infinite, or the source cannot be read.
        OutputError: from ``write``.
    """
    if item.scheme.kind == "kept":
        _write_kept(item, delta, write)
        return None
    if item.scheme.kind == "nf4":
        return _write_nf4(item, write)
    data, scale = (spec.name for spec in stored_specs(item)[:2])
    if factors is not None:
        write(_factors_name(item.name), 0, factors.bfloat16())
    return _write_rows(item, delta, write, data, scale, factors)


def _write_kept(item: Item, delta: Update | None, write: Write) -> None:
    itemsize = item.scheme.dtype.itemsize
    done = 0
    for chunk in merged_chunks(item, delta):
        if not all_finite(chunk):
            raise not_finite(item.name)
        write(item.name, done * itemsize, _as_they_lie(item, chunk.to(item.scheme.dtype)))
        done += chunk.numel()


def _write_rows(item: Item, delta: Update | None, write: Write, data: str, scale: str, factors: Tensor | None) -> float:
    scales = torch.empty(item.ref.rows)
    row = done = 0
    off = size = 0.0
    for chunk in merged_chunks(item, delta, float32=True):
        # The error of a rotated weight is that of the weight turned back: a rotation keeps norms.
        chunk = rotated(chunk if factors is None else chunk / factors, item.scheme.group)
        q, scales[row : row + len(chunk)], chunk_off, chunk_size = quantize_chunk(chunk, item.scheme.dtype, item.name)
        write(data, done, _as_they_lie(item, q))
        row, done = row + len(chunk), done + q.numel()
        off, size = off + chunk_off, size + chunk_size
    write(scale, 0, scales)
    return math.sqrt(off / size) if size else 0.0


def _as_they_lie(item: Item, rows: Tensor) -> Tensor:
    """Rows [rows, width] in the order of their bytes in the artifact."""
    return rows.view(len(rows), *item.ref.shape[1:]).movedim(1, -1) if item.channels_last else rows


def _write_nf4(item: Item, write: Write) -> float:
    # 4-bit blocks run across rows, so the tensor is taken as a whole: 0.17 GB in float32 for the largest.
    from bitsandbytes import functional as bnb

    weight = item.ref.read().float()
    if not all_finite(weight):
        raise not_finite(item.name)
    packed, state = bnb.quantize_4bit(weight, blocksize=NF4_BLOCK, quant_type="nf4", compress_statistics=False)
    write(item.name, 0, packed)
    write(f"{item.name}.absmax", 0, state.absmax.float())
    error = bnb.dequantize_4bit(packed, state).float().view_as(weight).sub_(weight).norm() / weight.norm()
    return float(error.nan_to_num())


def merged_chunks(item: Item, delta: Update | None, *, float32: bool = False) -> Iterator[Tensor]:
    """Rows of the merged weight, about CHUNK_VALUES values at a time: [rows, width], float32 if merged or asked for."""
    ref = item.ref
    width = math.prod(ref.shape[1:])
    step = max(1, CHUNK_VALUES // max(width, 1))
    if delta is None:
        for start in range(0, ref.rows, step):
            chunk = ref.read_rows(start, min(step, ref.rows - start))
            yield chunk.float() if float32 else chunk
        return
    add = delta.adder()
    for start in range(0, ref.rows, _MERGED_CHUNKS * step):
        rows = min(_MERGED_CHUNKS * step, ref.rows - start)
        yield from add(ref.read_rows(start, rows).float(), start).split(step)
