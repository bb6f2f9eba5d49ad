"""Would KV rings of 4 bits do, and what would they bring? Ways to keep them, simulated, against rings in int8.

python benchmarks/rings.py [--people 1] [--seconds 2] [--out benchmarks/results/rings_cpu.json]

Two models: the trained tiny face with weights in bf16, and the tiny reference pipeline with random ones in float32, so
that nothing but the rings rounds. Each variant makes the video freely, which gives frames, and teacher-forced from the
steps of int8 rings, which gives the error of single steps. "Planted": attention over keys of heads 128 wide, as the
14B's, of which 8 channels are 8 times as large, half of them by a constant. What is saved is what plans of the 14B say.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # training is not installed

import numpy as np
import torch
from plans import GIB, published
from quality import BASELINE, FIRST, pipeline_of
from ring_variants import VARIANTS, Coding, Rounded, Variant

from lowvram.compare.metrics import FrameScorer, TensorSums, mean_psnr, moving_pixels
from lowvram.compare.teacher_forcing import force, record
from lowvram.denoise import rollout
from lowvram.infer import machine
from lowvram.offload.placement import MemoryOptions
from lowvram.pipeline import AvatarPipeline, Request
from lowvram.planning import CARDS, Workload, memory_costs, plan
from lowvram.planning.memory_costs import KVBytes, kv_bytes
from lowvram_kernels.errors import OutOfMemoryError
from lowvram_models.constants import FPS
from lowvram_models.rope import apply_rope, block_rope
from lowvram_quantize.convert import convert
from lowvram_quantize.trained import write_trained
from training.tiny_face.case import Case
from training.tiny_face.run import machine as processor

Tensor = torch.Tensor
GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden" / "pipeline_tiny"
BAR_DB = 35.0
# card, GiB that a process of ours can have there, size; as of benchmarks/plans.py
CARDS_HERE = [
    ("rtx3060", 11.0, "384*256"),
    ("rtx4080", 14.5, "704*384"),
    ("rtx4090", 22.15, "704*384"),
    ("rtx4090", 22.15, "720*400"),
    ("rtx5090", 30.0, "704*384"),
]
PLANNED = ("turned-head", "offset")
PUBLISHED_HEAD_DIM, PUBLISHED_BLOCK_TOKENS = 128, 3168
RAM_GIB = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plan-again", type=Path, help="results to show with plans made anew")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if given.plan_again:
            result = json.loads(given.plan_again.read_text())
        else:
            result = measure(Path(folder), tuple(VARIANTS), people=given.people, seconds=given.seconds)
        result["plans"] = plans(Path(folder))
    print(markdown(result["variants"]), plan_markdown(result["plans"]), sep="\n\n")
    if given.out:
        given.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    missed = [row["title"] for row in result["variants"] if row["name"] and not row["face"]["psnr"] >= BAR_DB]
    if missed:
        sys.exit(f"under {BAR_DB:g} dB of int8 rings: {', '.join(missed)}")


def measure(folder: Path, only: tuple[str, ...], *, people: int, seconds: float) -> dict[str, Any]:
    """Both models, in ``folder``; the row without a name is of rings and sink in float32."""
    root = write_trained(folder / "face")
    trained = pipeline_of(root, folder / "bf16", dataclasses.replace(BASELINE, kv="int8"))
    cases = [Case(folder, FIRST + index, seconds) for index in range(people)]
    face = Model(trained, [case.request() for case in cases], [case.frames for case in cases])
    golden = Model(*golden_pipeline(folder / "fp32"))
    rows = []
    for name in ("", *only):
        variant = VARIANTS.get(name)
        with kept_as(variant):
            scores = {"face": face.score(), "golden": golden.score()}
        title = variant.title if variant else "rings and sink in float32"
        rows.append({"name": name, "title": title, **scores, **facts(variant)})
        print(f"{name or 'float32'}: done", file=sys.stderr, flush=True)
    return {
        "question": "would KV rings of 4 bits do?",
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(torch.device("cpu")) | {"processor": processor()},
        "people": [case.name for case in cases],
        "seconds": seconds,
        "bar_db": BAR_DB,
        "variants": rows,
    }


def golden_pipeline(artifact: Path) -> tuple[AvatarPipeline, list[Request], list[int]]:
    settings = json.loads((GOLDEN / "case.json").read_text())
    lora = GOLDEN / "ckpt" / "LiveAvatar" / "liveavatar.safetensors"
    convert(GOLDEN / "ckpt", artifact, precision="fp32", lora=lora, lora_alpha=float(settings["lora_alpha"]))
    names = ("size", "infer_frames", "num_clip", "sample_steps", "base_seed", "cond_rope_distance", "prompt")
    inputs = GOLDEN / "inputs"
    request = Request(
        image=inputs / "portrait.png", audio=inputs / "speech.wav", **{name: settings[name] for name in names}
    )
    pipeline = AvatarPipeline.from_artifact(artifact, device="cpu", memory=MemoryOptions(kv="int8"))
    return pipeline, [request], [settings["frames"]]


class Model:
    """A pipeline with int8 rings, and what it makes of each request: what variants are measured against."""

    def __init__(self, pipeline: AvatarPipeline, requests: list[Request], frames: list[int]):
        self._artifact, self._requests, self._frames = pipeline.runtime.artifact.path, requests, frames
        self._runs = [self._run(pipeline, index) for index in range(len(requests))]
        self._teachers = [record(pipeline, request) for request in requests]

    def _run(self, pipeline: AvatarPipeline, index: int) -> np.ndarray:
        return np.concatenate(list(pipeline.stream(self._requests[index])))[: self._frames[index]]

    def score(self) -> dict[str, Any]:
        """Rings as they are kept now: mean over all frames, worst frame, and the velocity's relative error."""
        pipeline = AvatarPipeline.from_artifact(self._artifact, device="cpu")
        frames, each = [], []
        for index, (wanted, teacher) in enumerate(zip(self._runs, self._teachers, strict=True)):
            scorer = FrameScorer(FPS, moving_pixels(wanted))
            frames += [scorer.score(*pair) for pair in zip(self._run(pipeline, index), wanted, strict=True)]
            each.append(force(pipeline, self._requests[index], teacher, quiet=True).values)
        return {
            "psnr": mean_psnr(frame.psnr for frame in frames),
            "psnr_min": min(frame.psnr for frame in frames),
            "ssim": sum(frame.ssim for frame in frames) / len(frames),
            "velocity_error": sum(values["velocity_error"] for values in each) / len(each),
            "token_error_p999": max(values["token_error_p999"] for values in each),
        }


@contextmanager
def kept_as(variant: Variant | None) -> Iterator[None]:
    """Rollouts that begin meanwhile keep their rings so; None: as they would."""
    if variant is None:
        yield
        return

    def made(_scheme: str, heads: int, head_dim: int, dtype: torch.dtype) -> Rounded:
        return Rounded(heads, head_dim, dtype, variant)

    with patch.object(rollout, "kv_format", made):
        yield


def facts(variant: Variant | None) -> dict[str, Any]:
    """Bits a value of the 14B's rings, keys and values together, and the error that attention has where large channels
    are planted."""
    if variant is None:
        return {"bits": 32.0, "planted": 0.0}
    each = [side.bits_a_value(PUBLISHED_BLOCK_TOKENS, PUBLISHED_HEAD_DIM) for side in (variant.keys, variant.values)]
    return {"bits": sum(each) / 2, "planted": planted_error(variant)}


def planted_error(variant: Variant, tokens: int = 1056, heads: int = 4) -> float:
    """Relative error of attention over one block of such keys."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(tokens, heads, PUBLISHED_HEAD_DIM, generator=generator) for _ in range(3))
    q = q[:64]
    k[..., 5:128:32] += 8.0
    k[..., 20:128:32] *= 8.0
    rope = block_rope(0, 3, 16, 22, PUBLISHED_HEAD_DIM)
    exact = apply_rope(k, rope)
    kept = apply_rope(variant.keys(k), rope) if variant.keys.before_rope else variant.keys(exact)
    sums = TensorSums()
    sums.add(_attended(q, kept, variant.values(v)), _attended(q, exact, v))
    return sums.score("").relative_error


def _attended(q_LNH: Tensor, k_TNH: Tensor, v_TNH: Tensor) -> Tensor:
    scores = torch.einsum("lnh,tnh->nlt", q_LNH, k_TNH) * q_LNH.shape[-1] ** -0.5
    return torch.einsum("nlt,tnh->lnh", scores.softmax(dim=-1), v_TNH)


def plans(folder: Path) -> list[dict[str, Any]]:
    """Of the 14B in int8, with rings in int8 and in 4 bits; the sink stays in int8."""
    codings = {"int8": None} | {name: VARIANTS[name].values for name in PLANNED}
    return [planned(folder, *case, name, coding) for case in CARDS_HERE for name, coding in codings.items()]


def planned(folder: Path, card: str, gib: float, size: str, rings: str, coding: Coding | None) -> dict[str, Any]:
    artifact, work = published(folder, "int8"), Workload.of_size(size)

    def found(ram_gib: int) -> Any:
        given = {"vram_bytes": int(gib * GIB), "ram_bytes": ram_gib * GIB, "card": CARDS[card]}
        with patch.object(memory_costs, "kv_bytes", four_bits(work, coding) if coding else kv_bytes):
            return plan(artifact, work, **given)

    usual = found(RAM_GIB)
    return {
        "card": card,
        "size": size,
        "budget_gib": gib,
        "rings": rings,
        "bits": coding.bits_a_value(work.block_tokens, PUBLISHED_HEAD_DIM) if coding else None,
        "layers_streamed": len(usual.placement.streamed_layers),
        "rings_on_host": len(usual.placement.host_rings),
        "host_gib": usual.peak_host_bytes / GIB,
        "smallest_host_gib": smallest(found),
        "predicted_arithmetic_s": usual.seconds.arithmetic,
        "predicted_pcie_s": usual.seconds.pcie,
        "predicted_seconds_per_block": usual.seconds_per_block,
        "limited_by": usual.limited_by,
    }


def four_bits(work: Workload, coding: Coding) -> Callable[..., KVBytes]:
    """What stands for ``kv_bytes``: a block of a ring in so many bits; a sink as it is."""

    def counted(config: Any, tokens: int, kv: str, heads: int, value_bytes: int) -> KVBytes:
        if tokens != work.block_tokens or kv != "int8":
            return kv_bytes(config, tokens, kv, heads, value_bytes)
        values = 2 * tokens * heads * config.head_dim
        bits = coding.bits_a_value(tokens, config.head_dim)
        return KVBytes(payload=values * coding.bits // 8, scales=round(values * (bits - coding.bits) / 8))

    return counted


def smallest(found: Callable[[int], Any]) -> int:
    """The least whole GiB of host memory that there is a plan for."""
    low, high = 1, RAM_GIB  # one of at most ``high`` is known to do
    while low < high:
        middle = (low + high) // 2
        try:
            found(middle)
            high = middle
        except OutOfMemoryError:
            low = middle + 1
    return low


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| rings, 4 bits where nothing else is said | bits a value | face: PSNR | worst frame | velocity | 99.9 % | "
        "random: PSNR | velocity | planted |",
        "| --- " + "| ---: " * 8 + "|",
    ]
    for row in rows:
        face, golden = row["face"], row["golden"]
        cells = [
            f"{row['bits']:.2f}",
            *(f"{face[name]:.1f} dB" for name in ("psnr", "psnr_min")),
            *(f"{face[name]:.2%}" for name in ("velocity_error", "token_error_p999")),
            f"{golden['psnr']:.1f} dB",
            f"{golden['velocity_error']:.3%}",
            f"{row['planted']:.1%}",
        ]
        lines.append(f"| {row['title']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plan_markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| card | size | rings | on the host | host | smallest host | PCIe | arithmetic | seconds a block |",
        "| --- | --- | --- " + "| ---: " * 6 + "|",
    ]
    for row in rows:
        bits = f"4 bits, {row['rings']}, {row['bits']:.2f} a value" if row["bits"] else row["rings"]
        lines.append(
            f"| {row['card']} | {row['size']} | {bits} | {row['rings_on_host']} of 160 | {row['host_gib']:.1f} GiB "
            f"| {row['smallest_host_gib']} GiB | {row['predicted_pcie_s']:.2f} s "
            f"| {row['predicted_arithmetic_s']:.2f} s "
            f"| {row['predicted_seconds_per_block']:.2f} ({row['limited_by']}) |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
