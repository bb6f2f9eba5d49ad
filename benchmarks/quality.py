"""What do 8 bits cost on weights that were trained? The tiny face in int8 and others, each against bf16.

python benchmarks/quality.py [--people 3] [--seconds 8] [--only int8,fp8] [--out benchmarks/results/quality_cpu.json]

People and voices are drawn and synthesized by numbers that training never saw. Each artifact makes each video twice:
freely, from the same seed, which gives frames; and teacher-forced, every step from the latents of the bf16 run, which
gives the error of single steps (``lowvram/compare/teacher_forcing.py``). Rings are kept in the dtype that is computed
in (float32 on a processor) unless they are said to be int8.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # training is not installed

import numpy as np
import torch

from lowvram.compare.metrics import FrameScorer, TensorSums, mean_psnr, moving_pixels
from lowvram.compare.teacher_forcing import force, record
from lowvram.compare.trajectories import Teacher
from lowvram.infer import machine
from lowvram.media.contact_sheet import follows
from lowvram.offload.placement import MemoryOptions
from lowvram.pipeline import AvatarPipeline
from lowvram.recorder import Recorder
from lowvram_models.constants import FPS
from lowvram_quantize.convert import convert
from lowvram_quantize.trained import write_trained
from training.tiny_face import faces
from training.tiny_face.case import Case
from training.tiny_face.run import machine as processor

if TYPE_CHECKING:
    from lowvram.schedule import Block


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """How an artifact is made, and how its rings are kept."""

    title: str
    options: dict[str, Any]
    kv: str = "auto"


BASELINE = Variant(title="every component bf16", options={"precision": "bf16"})
VARIANTS = {
    "int8": Variant(title="every component int8", options={"precision": "int8"}),
    "int8-rings": Variant(title="every component int8, KV rings int8", options={"precision": "int8"}, kv="int8"),
    "int8-nf4-text": Variant(
        title="every component int8, text encoder nf4", options={"precision": "int8", "text_encoder": "nf4"}
    ),
    "int8-dit": Variant(title="DiT int8, others bf16", options={"precision": "bf16", "dit": "int8"}),
    "int8-dit-not-rotated": Variant(
        title="DiT int8 not rotated, others bf16", options={"precision": "bf16", "dit": "int8", "rotate": False}
    ),
    "fp8": Variant(title="every component fp8", options={"precision": "fp8"}),
}
FIRST = faces.HELD_OUT + 700
"""Of the people; other measurements of the tiny face have other numbers."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--only", type=names, default=tuple(VARIANTS), help=", ".join(VARIANTS))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), given.only, people=given.people, seconds=given.seconds)
    print(markdown(result))
    if given.out:
        given.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")


def names(text: str) -> tuple[str, ...]:
    """Raises: ArgumentTypeError for a name that no variant has."""
    found = tuple(text.split(","))
    if unknown := [name for name in found if name not in VARIANTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} was given; expected some of {', '.join(VARIANTS)}")
    return found


def measure(folder: Path, only: tuple[str, ...], *, people: int, seconds: float) -> dict[str, Any]:
    """All videos of the baseline, then those of each variant, in ``folder``."""
    root = write_trained(folder / "ckpt")
    cases = [Case(folder, FIRST + index, seconds) for index in range(people)]
    baseline = pipeline_of(root, folder / "bf16", BASELINE)
    runs = {case.name: Run.free(baseline, case) for case in cases}
    teachers = {case.name: record(baseline, case.request()) for case in cases}
    own = [of_face(case, runs[case.name]) for case in cases]
    rows = []
    for name in only:
        candidate = pipeline_of(root, folder / name, VARIANTS[name])
        each = [scores(candidate, case, runs[case.name], teachers[case.name]) for case in cases]
        rows.append({"name": name, "title": VARIANTS[name].title, "kv": VARIANTS[name].kv, **summary(each)})
        print(f"{name}: done", file=sys.stderr, flush=True)
    return {
        "question": "what do 8 bits cost on weights that were trained?",
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(torch.device("cpu")) | {"processor": processor()},
        "people": [case.name for case in cases],
        "seconds": seconds,
        "baseline": {"title": BASELINE.title, **summary(own)},
        "variants": rows,
    }


def pipeline_of(root: Path, artifact: Path, variant: Variant) -> AvatarPipeline:
    """The checkpoint converted, on the processor."""
    lora = root / "LiveAvatar" / "liveavatar.safetensors"
    convert(root, artifact, lora=lora, **variant.options)
    return AvatarPipeline.from_artifact(artifact, device="cpu", memory=MemoryOptions(kv=variant.kv))


class Latents(Recorder):
    """Keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.latents: list[torch.Tensor] = []

    def latent(self, block: Block, latent_CFhw: torch.Tensor) -> None:
        self.latents.append(latent_CFhw.cpu().clone())


@dataclasses.dataclass(frozen=True)
class Run:
    """One video: its latents, block by block, and the frames [F, H, W, 3] that are shown."""

    latents: list[torch.Tensor]
    frames: np.ndarray

    @classmethod
    def free(cls, pipeline: AvatarPipeline, case: Case) -> Run:
        recorder = Latents()
        frames = np.concatenate(list(pipeline.stream(case.request(), recorder=recorder)))
        return cls(recorder.latents, frames[: case.frames])


def scores(candidate: AvatarPipeline, case: Case, baseline: Run, teacher: Teacher) -> dict[str, Any]:
    """Of one person and voice: freely, teacher-forced, and what is seen of the face."""
    run = Run.free(candidate, case)
    forced = force(candidate, case.request(), teacher, quiet=True)
    scorer = FrameScorer(FPS, moving_pixels(baseline.frames))
    frames = [scorer.score(mine, theirs) for mine, theirs in zip(run.frames, baseline.frames, strict=True)]
    total, blocks = TensorSums(), []
    for mine, theirs in zip(run.latents, baseline.latents, strict=True):
        sums = TensorSums()
        sums.add(mine, theirs)
        total.merge(sums)
        blocks.append(sums.score("").relative_error)
    return {
        "teacher_forced": forced.values | {"by_step": [step.relative_error.value for step in forced.by_step]},
        "free": {
            "latent_error": total.score("").relative_error,
            "latent_error_first": blocks[0],
            "latent_error_max": max(blocks),
            "psnr": mean_psnr(frame.psnr for frame in frames),
            "psnr_min": min(frame.psnr for frame in frames),
            "ssim": statistics.fmean(frame.ssim for frame in frames),
            "ssim_min": min(frame.ssim for frame in frames),
        },
        **of_face(case, run),
    }


def of_face(case: Case, run: Run) -> dict[str, Any]:
    """Whether the mouth follows the voice, and how far the background is from the portrait's."""
    return {
        "face": {
            "mouth_with_voice": follows(run.frames, case.voice, FPS),
            "background_psnr": case.background_psnr(run.frames),
        }
    }


def summary(each: list[dict[str, Any]]) -> dict[str, Any]:
    """Of several people's scores, group by group: mean, standard deviation (0 of one person) and everybody's."""
    found: dict[str, Any] = {}
    for group, values in each[0].items():
        found[group] = {name: spread([one[group][name] for one in each]) for name in values}
    return found


def spread(values: list[Any]) -> Any:
    """Of figures, or of as many lists of them, place by place."""
    if isinstance(values[0], list):
        return [spread(list(place)) for place in zip(*values, strict=True)]
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "deviation": deviation, "each": values}


def markdown(result: dict[str, Any]) -> str:
    """One row a variant: relative errors, decibels and correlations, mean and deviation of all people."""
    lines = [
        "| artifact | teacher-forced: velocity | first block | steps, first to last | free: latents | worst block | "
        "PSNR | SSIM | mouth with voice | background |",
        "| --- " + "| ---: " * 9 + "|",
    ]
    own = result["baseline"]
    lines.append(f"| {own['title']} | | | | | | | | {plain(own, 'mouth_with_voice')} | {decibels(own, 'face')} |")
    for row in result["variants"]:
        forced, free = row["teacher_forced"], row["free"]
        cells = [
            *(percent(forced[name]) for name in ("velocity_error", "velocity_error_first")),
            ", ".join(f"{step['mean'] * 100:.2f}" for step in forced["by_step"]) + "%",
            *(percent(free[name]) for name in ("latent_error", "latent_error_max")),
            decibels(row, "free", "psnr"),
            f"{free['ssim']['mean']:.4f} ± {free['ssim']['deviation']:.4f}",
            plain(row, "mouth_with_voice"),
            decibels(row, "face"),
        ]
        lines.append(f"| {row['title']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def percent(value: dict[str, Any]) -> str:
    return f"{value['mean']:.2%} ± {value['deviation'] * 100:.2f}"


def plain(row: dict[str, Any], name: str) -> str:
    return f"{row['face'][name]['mean']:.3f} ± {row['face'][name]['deviation']:.3f}"


def decibels(row: dict[str, Any], group: str, name: str = "background_psnr") -> str:
    return f"{row[group][name]['mean']:.1f} ± {row[group][name]['deviation']:.1f} dB"


if __name__ == "__main__":
    main()
