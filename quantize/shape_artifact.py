"""Shape artifacts: whole ones of given shapes without a checkpoint: sparse files without values, or random ones.

A plan, a dry run and a benchmark need the names, shapes, slabs and files of a full-size model, not what it was trained
to. Without values a file is only as long as it says: it takes no room on the disk. The manifest says ``phantom`` (its
key for what has shapes and no trained weights behind them), has no checksums, and ``--verify`` refuses it.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from lowvram_kernels.errors import ConfigError
from lowvram_models.config import DiTConfig
from lowvram_quantize.asked import PRECISIONS, TEXT_ENCODER_PRECISIONS
from lowvram_quantize.components import (
    ComponentPlan,
    Item,
    Shapes,
    dit_items,
    dit_shapes,
    text_encoder_items,
    text_encoder_shapes,
    vae_items,
    vae_shapes,
)
from lowvram_quantize.copied import AUDIO_ENCODER, TOKENIZER
from lowvram_quantize.format import SMOOTH_SCALE
from lowvram_quantize.layout import lay_out, metadata_of
from lowvram_quantize.presets import PRESETS, Preset
from lowvram_quantize.provenance import component_facts, origin
from lowvram_quantize.publish import check_target, publish
from lowvram_quantize.schemes import MIXED, Scheme
from lowvram_quantize.slabs import Slab, TensorSpec, header_bytes
from lowvram_quantize.source import TensorRef
from lowvram_quantize.store import stored_specs
from lowvram_quantize.synthetic import distribution, write_tokenizer, write_wav2vec2_config
from lowvram_quantize.synthetic_encoders import wav2vec2_model
from lowvram_quantize.writer import disk_errors

Tensor = torch.Tensor
log = logging.getLogger(__name__)

# Values for bytes [begin, begin + nbytes) of a stored tensor: fill(item, spec, begin, nbytes) -> a tensor of so many.
Fill = Callable[[Item, TensorSpec, int, int], Tensor]

# Bytes asked of ``fill`` at once; a multiple of every dtype's size.
PIECE_BYTES = 1 << 24
_WRITERS = 4


def write_shape_artifact(
    out: Path,
    *,
    precision: str = "int8",
    preset: str = "14b",
    text_encoder: str | None = None,
    apart: Mapping[str, str] = MappingProxyType({}),
    fill: Fill | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an artifact of a preset's shapes and return its folder.

    Args:
        out: folder to make; its parent has to exist.
        precision: int8, fp8, bf16 or fp32, for every component; of the text encoder where ``text_encoder`` (which
            may also be nf4) does not say otherwise.
        apart: tensors of the DiT -> int8, fp8 or bf16, for a mixed one.
        preset: "14b" for the published shapes, "tiny" for the smallest that go through every step.
        fill: gives the values, at most ``PIECE_BYTES`` at a time and from several threads, as ``RandomFill`` does;
            without it files have no values and take no disk.
        overwrite: replace a finished artifact.

    Raises:
        ConfigError: an unknown preset or precision, or ``out`` exists.
        InputError: the folder of ``out`` does not exist.
        OutputError: the disk is full or cannot be written.
    """
    out = Path(out)
    shapes = _checked(preset, precision, text_encoder)
    check_target(out, overwrite=overwrite)
    partial = out.with_name(out.name + ".shapes")
    with disk_errors(partial, 0):
        shutil.rmtree(partial, ignore_errors=True)
        for folder in (AUDIO_ENCODER, TOKENIZER):
            (partial / folder).mkdir(parents=True)
        write_tokenizer(partial / TOKENIZER)
    plans = shape_plans(shapes, precision, text_encoder, apart)
    facts = {plan.name: _write_component(plan, partial, fill) for plan in plans}
    _write_audio_encoder(shapes, partial / AUDIO_ENCODER, fill)
    publish(partial, out, _manifest(preset, plans, facts, partial, "random values" if fill else "no values"))
    return out


def shape_plans(
    shapes: Preset, precision: str, text_encoder: str | None = None, apart: Mapping[str, str] = MappingProxyType({})
) -> list[ComponentPlan]:
    """What ``convert`` would plan for a checkpoint of these shapes; its items have no source to read."""
    config = DiTConfig.from_dict(shapes.dit)
    vae, text = {"base_dim": shapes.vae_base_dim}, dict(shapes.text_encoder)
    second = text_encoder or precision
    items = dit_items(config, _refs(dit_shapes(config)), precision, apart=apart)
    return [
        ComponentPlan("dit", MIXED if apart else precision, dict(shapes.dit), items),
        ComponentPlan("vae", precision, vae, vae_items(vae, _refs(vae_shapes(**vae)), precision)),
        ComponentPlan(
            "text_encoder", second, text, text_encoder_items(text, _refs(text_encoder_shapes(**text)), second)
        ),
    ]


def _checked(preset: str, precision: str, text_encoder: str | None) -> Preset:
    if preset not in PRESETS:
        raise ConfigError(f"preset is {preset!r}; expected one of {', '.join(PRESETS)}")
    for name, known in ((precision, PRECISIONS), (text_encoder or precision, TEXT_ENCODER_PRECISIONS)):
        if name not in known:
            raise ConfigError(f"precision is {name!r}; expected one of {', '.join(known)}")
    return PRESETS[preset]


def _refs(shapes: Shapes) -> dict[str, TensorRef]:
    nowhere = Path(os.devnull)
    return {
        name: TensorRef(name=name, dtype=torch.bfloat16, shape=shape, file=nowhere, offset=0)
        for name, shape in shapes.items()
    }


def _write_component(plan: ComponentPlan, folder: Path, fill: Fill | None) -> dict[str, Any]:
    by_slab, slabs = lay_out(plan)
    path = folder / f"{plan.name}.safetensors"
    header = header_bytes(slabs, metadata_of(plan.name))
    _write_file(path, header, slabs, (item for items in by_slab.values() for item in items), fill)
    return component_facts(plan, path, slabs, "", {slab.name: "" for slab in slabs}, {})


def _write_audio_encoder(shapes: Preset, folder: Path, fill: Fill | None) -> None:
    """wav2vec2's configuration and its weights, which are read by the library and so lie without padding."""
    with torch.device("meta"):
        model = wav2vec2_model(**shapes.audio_encoder)
    items = [
        Item(name, ref, Scheme("fp32", "kept", torch.float32), AUDIO_ENCODER)
        for name, ref in _refs({name: tuple(t.shape) for name, t in model.state_dict().items()}).items()
    ]
    specs: list[TensorSpec] = []
    end = 0
    for item in items:
        specs += [dataclasses.replace(spec, offset=end) for spec in stored_specs(item)]
        end += specs[-1].nbytes
    slab = Slab(name=AUDIO_ENCODER, offset=0, nbytes=end, tensors=tuple(specs))
    _write_file(folder / "model.safetensors", header_bytes([slab], {"format": "pt"}), [slab], items, fill)
    with disk_errors(folder, 0):
        write_wav2vec2_config(folder, model)


def _write_file(path: Path, header: bytes, slabs: list[Slab], items: Iterable[Item], fill: Fill | None) -> None:
    nbytes = len(header) + sum(slab.nbytes for slab in slabs)
    with disk_errors(path, nbytes), path.open("wb", buffering=0) as file:
        file.write(header)
        file.truncate(nbytes)
        if fill is None:
            return
        _find_room(file.fileno(), nbytes)
        places = {spec.name: (len(header) + slab.offset + spec.offset) for slab in slabs for spec in slab.tensors}
        tasks = [(item, spec, places[spec.name]) for item in items for spec in stored_specs(item)]
        with ThreadPoolExecutor(max_workers=_WRITERS) as pool:
            # Many systems let one of them write to the file at a time; the others draw and scale meanwhile.
            for done in [pool.submit(_write_tensor, file.fileno(), fill, *task) for task in tasks]:
                done.result()


def _find_room(file: int, nbytes: int) -> None:
    """Have the disk's room found beforehand, where the file system can: half of the time of a write goes into it, and
    a disk that is too small is told at once."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise


def _write_tensor(file: int, fill: Fill, item: Item, spec: TensorSpec, place: int) -> None:
    for begin in range(0, spec.nbytes, PIECE_BYTES):
        nbytes = min(PIECE_BYTES, spec.nbytes - begin)
        values = fill(item, spec, begin, nbytes).contiguous().flatten().view(torch.uint8)
        if values.numel() != nbytes:
            raise ValueError(f"fill gave {values.numel()} bytes of {spec.name}; expected {nbytes}")
        raw, at = memoryview(values.numpy().data), place + begin
        while raw.nbytes:
            written = os.pwrite(file, raw, at)
            raw, at = raw[written:], at + written


def _manifest(
    preset: str, plans: list[ComponentPlan], facts: dict[str, dict[str, Any]], folder: Path, values: str
) -> dict[str, Any]:
    copied = [path for name in (AUDIO_ENCODER, TOKENIZER) for path in sorted((folder / name).iterdir())]
    return {
        **origin(plans),
        "phantom": {"preset": preset, "values": values},
        "components": facts,
        "files": {path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": ""} for path in copied},
        "sources": [],
        "lora": None,
    }


class RandomFill:
    """Random weights that keep activations finite, at the speed of a copy: slices of a few drawn pools.

    Norms are near 1, biases small, every other weight has a standard deviation of about 1 / sqrt(fan-in), in 8 and
    4 bit through one scale for all channels. Values repeat from tensor to tensor (a pool has ``POOL_VALUES``), which
    no kernel's time depends on. The same seed gives the same bytes.
    """

    POOL_VALUES = (1 << 24) + 4099
    # Standard deviations of the pools of stored values: uniform -127..127; normal; that of NF4's 16 codes.
    _STD = {torch.int8: 73.6, torch.float8_e4m3fn: 64.0, torch.uint8: 0.52}  # noqa: RUF012

    def __init__(self, seed: int = 0):
        draw = torch.Generator().manual_seed(seed)
        size = (self.POOL_VALUES,)
        normal = _ring(torch.randn(size, generator=draw))
        self._normal = {torch.float32: normal, torch.bfloat16: normal.bfloat16()}
        self._pools = {
            torch.int8: _ring(torch.randint(-127, 128, size, generator=draw, dtype=torch.int8)),
            torch.uint8: _ring(torch.randint(0, 256, size, generator=draw, dtype=torch.uint8)),
            torch.float8_e4m3fn: normal.mul(self._STD[torch.float8_e4m3fn]).to(torch.float8_e4m3fn),
        }

    def __call__(self, item: Item, spec: TensorSpec, begin: int, nbytes: int) -> Tensor:
        count = nbytes // spec.dtype.itemsize
        if spec.dtype in self._pools:
            return self._slice(self._pools[spec.dtype], spec, begin, count)
        if spec.name.endswith(SMOOTH_SCALE):  # a half, one and two, the same where inputs are the same
            codes = self._pools[torch.uint8][begin // spec.dtype.itemsize :][:count] % 3
            return torch.exp2(codes.float() - 1).to(spec.dtype)
        mean, std = distribution(item.name, item.ref.shape)
        if item.scheme.kind != "kept":  # what a quantized weight has beside its values is their scale
            stored = stored_specs(item)[0].dtype
            return torch.full((count,), std / self._STD[stored], dtype=spec.dtype)
        values = self._slice(self._normal[spec.dtype], spec, begin, count).mul(std)
        return values.add_(mean) if mean else values

    def _slice(self, pool: Tensor, spec: TensorSpec, begin: int, count: int) -> Tensor:
        start = (zlib.crc32(spec.name.encode()) + begin // spec.dtype.itemsize) % self.POOL_VALUES
        return pool[start : start + count]


def _ring(pool: Tensor) -> Tensor:
    """The pool with its beginning once more behind its end, so that any piece of it is one slice."""
    return torch.cat([pool, pool[:PIECE_BYTES]])


__all__ = ["PIECE_BYTES", "Fill", "RandomFill", "shape_plans", "write_shape_artifact"]
