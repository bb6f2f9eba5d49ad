"""One pass over all layers, every one of them streamed: by lowvram, and by diffusers' group offloading.

Both run ``Rollout.advance`` over the same artifact with the same inputs, blocks and rings, which lie on the device;
only who brings the weights differs. lowvram streams from slabs into two staging slots; diffusers takes each layer as a
block-level group with a stream and prefetching (``apply_group_offloading``), with and without ``record_stream``.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import hashlib
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
from full_size_parts import INFER_FRAMES, SIZES, STEPS, Skipped, opened
from torch import nn

from lowvram.byte_sizes import gib
from lowvram.denoise.rollout import Rollout, RolloutSettings
from lowvram.devices import choose_dtype
from lowvram.loading.weights import bind, build_dit, load_shared
from lowvram.offload.copy_engine import Engine, engine_for
from lowvram.offload.layers import Layers, layer_slab
from lowvram.offload.placement import Placement
from lowvram.planning.measure import rates_of
from lowvram.schedule import Block, blocks_of, latent_frames_per_clip
from lowvram_models.constants import FRAMES_PER_LATENT, LATENT_CHANNELS, MOTION_LATENTS, PIXELS_PER_LATENT
from lowvram_models.dit import CausalDiT
from lowvram_quantize.format import Artifact, Component

Tensor = torch.Tensor

MEASURED_BLOCKS = 3
# With rings for one step only where four steps' would take more than a part of the card.
RINGS_SHARE = 0.5


class Layer(nn.Module):
    """A layer's modules, as its slab names them, behind one ``forward`` that hooks can be put on."""

    def __init__(self, dit: CausalDiT, component: Component, index: int):
        super().__init__()
        paths = {spec.name.rpartition(".")[0] for spec in component.slab_specs(layer_slab(index))}
        self.parts = nn.ModuleList(dit.get_submodule(path) for path in sorted(paths))
        self._run: Callable[..., Tensor] = dit.layer
        self._index = index

    def forward(self, *args: Any) -> Tensor:
        return self._run(self._index, *args)


class Stack(nn.Module):
    """All layers; a pass goes through ``forward``, where prefetching begins."""

    def __init__(self, dit: CausalDiT, component: Component):
        super().__init__()
        self.layers = nn.ModuleList(Layer(dit, component, i) for i in range(dit.config.num_layers))
        # diffusers prefetches only where the top module has something of its own.
        self.register_buffer("own", torch.zeros(1))

    def forward(self, work: Callable[[], None]) -> None:
        work()


class Present:
    """In place of ``Layers``: somebody else brings the weights."""

    def __init__(self, count: int):
        self.count = count

    def place(self, streamed: Any, slots: int) -> None: ...

    def enter(self, index: int) -> None: ...

    def leave(self, index: int) -> None: ...


@dataclasses.dataclass(kw_only=True)
class Bench:
    """A rollout and how one of its passes is made."""

    rollout: Rollout
    through: Callable[[Callable[[], None]], None]
    draw: torch.Generator

    def start(self, block: Block) -> None:
        shape = (LATENT_CHANNELS, block.frames, *self.rollout.settings.latent_size)
        config = self.rollout.dit.config
        audio = (1, config.audio_layers, config.audio_dim, FRAMES_PER_LATENT * block.frames)
        self.rollout.start(block, self.random(*shape), self.random(*audio))

    def advance(self, items: list[tuple[Block, int]]) -> None:
        self.through(lambda: self.rollout.advance(items))

    def block(self, block: Block) -> tuple[float, Tensor]:
        """Seconds a pass, and the latent, of a block from start to end, step by step."""
        self.start(block)
        steps = self.rollout.settings.sample_steps
        seconds = self.timed([[(block, step)] for step in range(steps)])
        return seconds / steps, self.rollout.finish(block)

    def timed(self, passes: list[list[tuple[Block, int]]]) -> float:
        self.rollout.engine.settle()
        begin = time.perf_counter()
        for items in passes:
            self.advance(items)
        self.rollout.engine.settle()
        return time.perf_counter() - begin

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.draw)


def stream(options: argparse.Namespace, precision: str, *, diffusers: bool) -> dict[str, Any]:
    """Seconds a pass of one step; of lowvram also a step's share of a pass that serves a whole wave."""
    device = torch.device(options.device)
    component = Artifact.open(opened(options, precision)).component("dit")
    steps = steps_that_fit(component, options, precision, device)
    about = {
        "layers": component.config["num_layers"],
        "weight_bytes": sum(component.slab_nbytes(layer_slab(i)) for i in range(component.config["num_layers"])),
        "rings": f"{precision}, full, all on the device, for {steps} step(s)",
        "pcie_s_per_pass": None,
    }
    if device.type == "cuda":
        about["pcie_s_per_pass"] = about["weight_bytes"] / rates_of(device).h2d
    check_host(component, device, diffusers=diffusers)
    if not diffusers:
        return about | {"lowvram": ours(component, options, precision, steps)}
    variants = {}
    for record_stream in (True, False):
        name = "record_stream" if record_stream else "default"
        variants[name] = theirs(component, options, precision, steps, record_stream=record_stream)
    if device.type != "cuda":
        reason = "group offloading with streams needs a CUDA device; it computed the same latents here without"
        return about | {"streams": reason, "latents": [v["latents"] for v in variants.values()]}
    return about | {"diffusers": variants}


def steps_that_fit(component: Component, options: argparse.Namespace, precision: str, device: torch.device) -> int:
    if device.type != "cuda":
        return STEPS
    tokens = latent_size(options)[0] * latent_size(options)[1] // 4 * latent_frames_per_clip(INFER_FRAMES)
    config = component.config
    rings = STEPS * config["num_layers"] * 2 * tokens * config["dim"] * (1 if precision == "int8" else 2)
    return STEPS if rings < RINGS_SHARE * torch.cuda.mem_get_info(device)[0] else 1


def latent_size(options: argparse.Namespace) -> tuple[int, int]:
    _, height, width = SIZES[options.preset]
    return height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT


def check_host(component: Component, device: torch.device, *, diffusers: bool) -> None:
    """Both pin all layers; diffusers each tensor by itself, and torch rounds each up to a power of two."""
    names = [layer_slab(i) for i in range(component.config["num_layers"])]
    rounded = sum(1 << (spec.nbytes - 1).bit_length() for name in names for spec in component.slab_specs(name))
    needed = rounded if diffusers else sum(map(component.slab_nbytes, names))
    there = psutil.virtual_memory().available
    if device.type == "cuda" and needed > 0.9 * there:
        raise Skipped(f"{gib(needed)} of host memory would be pinned, {gib(there)} are there")


def ours(component: Component, options: argparse.Namespace, precision: str, steps: int) -> dict[str, Any]:
    device = torch.device(options.device)
    dtype, engine = choose_dtype("auto", device), engine_for(device)
    dit = built(component, device, dtype)
    bench = bench_of(dit, Layers(dit, component, engine, dtype), engine, options, precision, steps, lambda work: work())
    blocks, before = filled(bench), bench.rollout.engine.bytes_in
    found = measured(bench, blocks)
    passes = MEASURED_BLOCKS * steps
    found["bytes_in_per_pass"] = (bench.rollout.engine.bytes_in - before) / passes
    return found | {"wave": STEPS, "s_per_step_in_a_wave": wave_seconds(bench, blocks)} | peaks(device)


def theirs(
    component: Component, options: argparse.Namespace, precision: str, steps: int, *, record_stream: bool
) -> dict[str, Any]:
    from diffusers.hooks import apply_group_offloading

    device = torch.device(options.device)
    dtype, streams = choose_dtype("auto", device), device.type == "cuda"
    dit = built(component, device, dtype)
    for index in range(dit.config.num_layers):
        slab = layer_slab(index)
        bind(dit, component.views(slab, component.read_slab(slab)), dtype)
    stack = Stack(dit, component)
    apply_group_offloading(
        stack,
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=streams,
        record_stream=streams and record_stream,
    )
    dit.layer = lambda index, *args: stack.layers[index](*args)
    bench = bench_of(dit, Present(dit.config.num_layers), engine_for(device), options, precision, steps, stack)
    return measured(bench, filled(bench)) | peaks(device)


def built(component: Component, device: torch.device, dtype: torch.dtype) -> CausalDiT:
    gc.collect()  # hooks hold the layers of the variant before in cycles
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    dit = build_dit(component)
    load_shared(dit, component, device, dtype)
    return dit


def bench_of(
    dit: CausalDiT,
    layers: Any,
    engine: Engine,
    options: argparse.Namespace,
    precision: str,
    steps: int,
    through: Callable[[Callable[[], None]], None],
) -> Bench:
    device, draw = torch.device(options.device), torch.Generator().manual_seed(options.seed)
    settings = RolloutSettings(
        frames_per_clip=latent_frames_per_clip(INFER_FRAMES), latent_size=latent_size(options), sample_steps=steps
    )
    placement = Placement(
        streamed_layers=tuple(range(layers.count)), kv="int8" if precision == "int8" else "plain", wave=STEPS
    )
    context = torch.randn(dit.config.text_len // 2, dit.config.text_dim, generator=draw)
    rollout = Rollout(
        dit, layers, context, settings, dtype=choose_dtype("auto", device), engine=engine, placement=placement
    )
    return Bench(rollout=rollout, through=through, draw=draw)


def filled(bench: Bench) -> list[Block]:
    """Fill sink and rings with a first clip; returns blocks that see all of them. The first passes are not measured:
    kernels are compiled there, and diffusers learns the order of the layers."""
    settings = bench.rollout.settings
    shapes = [(LATENT_CHANNELS, frames, *settings.latent_size) for frames in (1, MOTION_LATENTS)]
    bench.through(lambda: bench.rollout.prefill(*(bench.random(*shape) for shape in shapes)))
    clips = 2 + -(-(MEASURED_BLOCKS + STEPS) * 3 // settings.frames_per_clip)
    blocks = list(blocks_of(clips, settings.frames_per_clip))
    for block in itertools.takewhile(lambda block: block.clip == 0, blocks):
        bench.block(block)
    return [block for block in blocks if block.clip > 0]


def measured(bench: Bench, blocks: list[Block]) -> dict[str, Any]:
    seconds, latents = zip(*(bench.block(block) for block in blocks[:MEASURED_BLOCKS]), strict=True)
    last = latents[-1].float().cpu()
    if not last.isfinite().all():
        raise ArithmeticError("the latents are not finite")
    digest = hashlib.sha256(last.numpy().tobytes()).hexdigest()
    return {"s_per_pass": statistics.median(seconds), "passes_s": list(seconds), "latents": digest[:16]}


def wave_seconds(bench: Bench, blocks: list[Block]) -> float:
    """Seconds a step where each pass takes one step of ``STEPS`` blocks."""
    steps = bench.rollout.settings.sample_steps
    chosen = blocks[MEASURED_BLOCKS : MEASURED_BLOCKS + STEPS]
    for block in chosen:
        bench.start(block)
    items = [(block, max(0, steps - 1 - number)) for number, block in enumerate(chosen)]
    bench.advance(items)
    return bench.timed([items] * STEPS) / STEPS / len(items)


def peaks(device: torch.device) -> dict[str, int | None]:
    if device.type != "cuda":
        return {"peak_allocated_bytes": None, "peak_reserved_bytes": None}
    return {
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(device),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
    }
