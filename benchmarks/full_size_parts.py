"""What the child processes of ``full_size.py`` do: tell the machine, write an artifact, make clips."""

from __future__ import annotations

import argparse
import itertools
import logging
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from full_size_artifacts import PRECISIONS, artifact_path, remove

from lowvram.byte_sizes import gib, parse_bytes
from lowvram.infer import infer, machine
from lowvram.media.samples import draw_portrait, synth_voice, write_wav
from lowvram.offload.placement import MemoryOptions
from lowvram.outputs import Outputs
from lowvram.pipeline import AvatarPipeline, Request
from lowvram.planning.measure import CudaRunner
from lowvram.schedule import blocks_of, latent_frames_per_clip, ticks
from lowvram_kernels.errors import CheckpointError
from lowvram_models.constants import FPS
from lowvram_quantize.format import Artifact
from lowvram_quantize.layout import lay_out
from lowvram_quantize.presets import PRESETS
from lowvram_quantize.shape_artifact import RandomFill, shape_plans, write_shape_artifact

CLIPS, INFER_FRAMES, STEPS = 3, 48, 4
GRAPH_CLIPS = 5  # eager, eager with a whole ring in sight, captured, and two that are replayed
SIZES = {"14b": ("704*384", 384, 704), "tiny": ("128*128", 128, 128)}
SPARE_DISK_BYTES = 4 << 30  # wav2vec2 in float32, a video, and a margin
# Without a cap a smaller card runs as with one.
MUCH_LARGER = 1.5


class Skipped(Exception):
    """A part that cannot be measured here, and why."""


def do(part: str, options: argparse.Namespace) -> dict[str, Any]:
    logging.basicConfig(format="[full_size] %(name)s: %(message)s")
    logging.getLogger("lowvram").setLevel(logging.INFO)
    kind, _, precision = part.rpartition("-")
    if part == "machine":
        return machine_facts(options)
    if kind == "artifact":
        return write_artifact(options, precision)
    if kind in ("run-capped", "run-uncapped"):
        return run_clips(options, precision, capped=kind == "run-capped")
    if kind == "graphs":
        return run_graphs(options, precision)
    import full_size_layers as layers

    return layers.stream(options, precision, diffusers=kind == "diffusers")


def machine_facts(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(options.device)
    facts = {"preset": options.preset, "gpu": None, "driver": None, "triton": None} | machine(device)
    if device.type == "cuda":
        facts["driver"] = CudaRunner(device).key.split(" | ")[1]
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError:
        pass
    return facts


def write_artifact(options: argparse.Namespace, precision: str) -> dict[str, Any]:
    """An artifact of random values, or the one that is there."""
    path = artifact_path(options.dir, options.preset, precision)
    if is_there(path):
        return {"bytes": folder_bytes(path), "reused": True}
    make_room(options, precision)
    begin = time.perf_counter()
    try:
        write_shape_artifact(
            path, precision=precision, preset=options.preset, fill=RandomFill(options.seed), overwrite=True
        )
    except BaseException:
        shutil.rmtree(path.with_name(path.name + ".shapes"), ignore_errors=True)
        raise
    seconds, nbytes = time.perf_counter() - begin, folder_bytes(path)
    return {"bytes": nbytes, "reused": False, "write_s": seconds, "bytes_per_second": nbytes / seconds}


def is_there(path: Path) -> bool:
    try:
        return Artifact.open(path).shape_values == "random values"
    except CheckpointError:
        return False


def make_room(options: argparse.Namespace, precision: str) -> None:
    """Where the disk is too small for both artifacts, the other one gives way: its parts are done by now."""
    plans = shape_plans(PRESETS[options.preset], precision)
    needed = sum(slab.nbytes for plan in plans for slab in lay_out(plan)[1])
    needed += SPARE_DISK_BYTES if options.preset == "14b" else 0
    for other in PRECISIONS:
        path = artifact_path(options.dir, options.preset, other)
        if other != precision and shutil.disk_usage(options.dir).free < needed and is_there(path):
            remove(path)
    if (free := shutil.disk_usage(options.dir).free) < needed:
        raise Skipped(f"{gib(needed)} of disk needed in {options.dir}, {gib(free)} free; --dir names another place")


def folder_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def opened(options: argparse.Namespace, precision: str) -> Path:
    path = artifact_path(options.dir, options.preset, precision)
    if not is_there(path):
        raise Skipped(f"there is no artifact of random values at {path}")
    return path


class Clocked(AvatarPipeline):
    """Notes time, bytes over PCIe and the device's memory whenever a block is delivered."""

    marks: list[dict[str, Any]]

    def stream(self, request: Any, **options: Any) -> Iterator[Any]:
        self.marks = []
        for frames in super().stream(request, **options):
            self.marks.append(self._mark())
            yield frames

    def _mark(self) -> dict[str, Any]:
        mark = {"s": time.perf_counter(), "in": self.runtime.engine.bytes_in, "out": self.runtime.engine.bytes_out}
        if self.runtime.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.runtime.device)
            mark |= {
                "allocated": torch.cuda.max_memory_allocated(self.runtime.device),
                "reserved": torch.cuda.max_memory_reserved(self.runtime.device),
                "used": total - free,
            }
        return mark


def run_clips(options: argparse.Namespace, precision: str, *, capped: bool) -> dict[str, Any]:
    """Three clips through ``infer``, as a user makes them."""
    path, budget = opened(options, precision), parse_bytes(options.vram_budget)
    if not capped and options.device == "cuda" and precision == "bf16":
        total = torch.cuda.get_device_properties(0).total_memory
        if total < MUCH_LARGER * budget:
            raise Skipped(f"the card has {gib(total)}: without a cap the run is the one with a cap")
    memory = MemoryOptions(
        vram_budget=budget if capped and options.device == "cuda" else None,
        ram_budget=parse_bytes(options.ram_budget) if options.ram_budget else None,
        kv=precision,
    )
    pipeline = Clocked.from_artifact(path, device=options.device, memory=memory)
    request = sample_request(options)
    report = infer(pipeline, request, Outputs(video=options.dir / "clips.mp4", overwrite=True), quiet=True)
    return summary(pipeline, report, memory.vram_budget)


def run_graphs(options: argparse.Namespace, precision: str) -> dict[str, Any]:
    """Clips with layers replayed as CUDA graphs: seconds of denoising a block, clip by clip, as they get warm."""
    if options.device != "cuda":
        raise Skipped("there are no CUDA graphs without a CUDA device")
    memory = MemoryOptions(kv=precision, cuda_graphs=True)
    pipeline = Clocked.from_artifact(opened(options, precision), device=options.device, memory=memory)
    request = sample_request(options, GRAPH_CLIPS)
    report = infer(pipeline, request, Outputs(video=options.dir / "graphs.mp4", overwrite=True), quiet=True)
    facts, stages = report["memory"]["cuda_graphs"], {stage["name"]: stage for stage in report["stages"]}
    if facts is None:
        raise Skipped("no layer stays on this card together with its KV ring")
    names = ("first", "eager", "capturing", *(f"replayed_{clip}" for clip in range(3, GRAPH_CLIPS)))
    seconds = {name: denoise_seconds(report["blocks"], clip) for clip, name in enumerate(names)}
    return {
        "denoise_s_per_block": seconds,
        "speedup": seconds["eager"] / seconds[names[-1]],
        "graphs": facts,
        "peak_reserved_bytes": peak(pipeline.marks, stages, "reserved"),
        "placement": placement_row(report),
        "predicted": predicted(report["memory"]["plan"]),
        "given_up": report["memory"]["given_up"],
    }


def denoise_seconds(blocks: list[dict[str, Any]], clip: int) -> float:
    return statistics.mean(block["denoise_s"] for block in blocks if block["clip"] == clip)


def sample_request(options: argparse.Namespace, clips: int = CLIPS) -> Request:
    size, height, width = SIZES[options.preset]
    image, audio = options.dir / f"portrait-{options.preset}.png", options.dir / "voice.wav"
    draw_portrait(height, width).save(image)
    write_wav(audio, synth_voice(clips * INFER_FRAMES / FPS + 1.0), 16000)
    return Request(
        image=image,
        audio=audio,
        prompt="A person speaks to the camera",
        size=size,
        infer_frames=INFER_FRAMES,
        num_clip=clips,
        sample_steps=STEPS,
    )


def summary(pipeline: Clocked, report: dict[str, Any], budget: int | None) -> dict[str, Any]:
    """All figures of a run. ``steady_*`` and ``*_per_block`` are medians over ``steady_groups``, from one delivery to
    the next: with decoding and writing, without a wave that fills or drains."""
    layout, plan, marks = report["memory"]["layout"], pipeline.run.plan, pipeline.marks
    placement = layout["placement"]
    steps = [
        {key: after[key] - before[key] for key in ("s", "in", "out")} for before, after in itertools.pairwise(marks)
    ]
    groups = steady_groups(placement["wave"])
    steady = {key: per_block([[steps[i - 1][key] for i in group] for group in groups]) for key in ("s", "in", "out")}
    seconds = steady["s"]
    frames = statistics.median(block["frames"] for block in report["blocks"][1:])
    on_gpu = pipeline.runtime.device.type == "cuda"
    stages = {stage["name"]: stage for stage in report["stages"]}
    return {
        "vram_budget_bytes": budget,
        "peak_allocated_bytes": peak(marks, stages, "allocated") if on_gpu else None,
        "peak_reserved_bytes": peak(marks, stages, "reserved") if on_gpu else None,
        "peak_device_used_bytes": max(mark["used"] for mark in marks) if on_gpu else None,
        "peak_rss_bytes": max(stage["peak_rss_bytes"] for stage in stages.values()),
        "steady_s_per_block": seconds,
        "steady_frames_per_second": frames / seconds,
        "steady_blocks": sum(map(len, groups)),
        "first_clip_s_per_block": clip_seconds(report["blocks"], 0),
        "later_clips_s_per_block": [clip_seconds(report["blocks"], clip) for clip in range(1, CLIPS)],
        "delivery_intervals_s": [step["s"] for step in steps],
        "bytes_in_per_block": steady["in"],
        "bytes_out_per_block": steady["out"],
        "bytes_in": report["memory"]["bytes_in"],
        "bytes_out": report["memory"]["bytes_out"],
        "rates": {"h2d": plan.card.rates.h2d, "d2h": plan.card.rates.d2h} if plan else None,
        "placement": placement_row(report),
        "predicted": predicted(report["memory"]["plan"]),
        "stages": [stage_row(stage, plan.stage_peaks if plan else {}) for stage in stages.values()],
        "given_up": report["memory"]["given_up"],
        "size": report["settings"]["size"],
        "frames": report["frames"],
        "seconds": report["seconds"],
        "kernels": report["kernels"],
    }


def placement_row(report: dict[str, Any]) -> dict[str, Any]:
    placement = report["memory"]["layout"]["placement"]
    counts = {name: len(placement[name]) for name in ("streamed_layers", "host_rings")}
    return counts | {name: placement[name] for name in ("kv", "wave")}


def steady_groups(wave: int) -> list[list[int]]:
    """Blocks from the second clip on that only full passes worked for since the block before them, in the shortest
    groups that took as many steps as their blocks have: with a wave of 2, blocks come after one pass and after three.
    """
    groups: list[list[int]] = []
    group, items, full = list[int](), 0, True
    for tick in ticks(blocks_of(CLIPS, latent_frames_per_clip(INFER_FRAMES)), STEPS, wave):
        items, full = items + len(tick.items), full and len(tick.items) == wave and not tick.refresh
        block = tick.finished(STEPS)
        if block is None:
            continue
        group = [*group, block.index] if full and block.clip > 0 else []
        if group and items == STEPS * len(group):
            groups, group = [*groups, group], []
        items, full = (items if group else 0), True
    return groups


def per_block(groups: list[list[float]]) -> float:
    return statistics.median(sum(group) / len(group) for group in groups)


def clip_seconds(blocks: list[dict[str, Any]], clip: int) -> float:
    """Seconds a block of a whole clip, denoising and decoding, with the passes of a wave that is not full."""
    own = [block for block in blocks if block["clip"] == clip]
    return sum(block["denoise_s"] + block["decode_s"] for block in own) / len(own)


def peak(marks: list[dict[str, Any]], stages: dict[str, dict[str, Any]], what: str) -> int:
    in_stages = max(stage[f"peak_vram_{what}_bytes"] for stage in stages.values())
    return max(in_stages, *(mark[what] for mark in marks))


def predicted(plan: dict[str, Any] | None) -> dict[str, Any] | None:
    keys = ("peak_vram_bytes", "peak_host_bytes", "reserve_bytes", "seconds_per_block", "limited_by")
    return None if plan is None else {key: plan[key] for key in (*keys, "pcie_bytes_per_block")}


def stage_row(stage: dict[str, Any], planned: dict[str, int]) -> dict[str, Any]:
    return {
        "stage": stage["name"],
        "seconds": stage["seconds"],
        "predicted_bytes": planned.get(stage["name"]),
        "allocated_bytes": stage["peak_vram_allocated_bytes"] or None,
        "reserved_bytes": stage["peak_vram_reserved_bytes"] or None,
        "rss_bytes": stage["peak_rss_bytes"],
    }
