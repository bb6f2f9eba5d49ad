"""Which of the DiT's Linears are worth more bytes? Each kind of them alone in int8, and whole mixed artifacts.

python benchmarks/sensitivity.py [--blocks 2] [--seconds 8] [--only units,budgets] [--out FILE]

The tiny trained face makes a video of a person that training never saw, teacher-forced: every step begins with the
latents of the bf16 run, and what is measured is the relative error of the DiT's output (as ``benchmarks/quality.py``).
units: each unit of Linears that are stored alike in int8, all else in bf16. ``sensitivity`` is the square of the
output's relative error over the mean square of the weights'; its means by kind are the table that ``--precision auto``
predicts with. budgets: artifacts of ``--precision auto`` with so many bytes between uniform int8 and uniform bf16, what
was predicted of them and what is measured; by that table, and by what ``--measure-on`` measures on another face.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # training is not installed

import torch
from quality import FIRST

from lowvram.calibrate.contributions import contributions
from lowvram.compare.teacher_forcing import force, record
from lowvram.infer import machine
from lowvram.pipeline import AvatarPipeline
from lowvram_quantize.convert import convert
from lowvram_quantize.format import Artifact
from lowvram_quantize.measure_on import IN_EVERY_STEP
from lowvram_quantize.original import original_of
from lowvram_quantize.sensitivity import role_of
from lowvram_quantize.trained import write_trained
from lowvram_quantize.units import unit_of, units_of
from training.tiny_face.case import Case
from training.tiny_face.run import machine as processor

SHARES = (0.0, 0.1, 0.25, 0.5, 0.75)
"""Of the bytes that bf16 takes beyond int8."""
PARTS = ("units", "budgets")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--only", default=",".join(PARTS), help=", ".join(PARTS))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    only = given.only.split(",")
    if unknown := [part for part in only if part not in PARTS]:
        parser.error(f"--only has {unknown[0]!r}; expected some of {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), only, blocks=given.blocks, seconds=given.seconds)
    print(markdown(result))
    if given.out:
        given.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")


class Face:
    """The tiny face in any precision of its DiT, all else in bf16, against bf16."""

    def __init__(self, folder: Path, *, blocks: int, seconds: float):
        self._folder, self._blocks = folder, blocks
        self._root = write_trained(folder / "ckpt")
        self._case = Case(folder, FIRST, seconds)
        baseline = AvatarPipeline.from_artifact(self.converted(dit="bf16"), device="cpu")
        self._teacher = record(baseline, self._case.request(), blocks=blocks)

    def parts(self) -> dict[str, float]:
        """What ``--measure-on`` measures, of the default face and voice."""
        lora = self._root / "LiveAvatar" / "liveavatar.safetensors"
        original = original_of(self._root, lora=lora)
        members = {unit: [item.name for item in own] for unit, own in units_of(original.plan.items).items()}
        chosen = {unit: names for unit, names in members.items() if unit.startswith(IN_EVERY_STEP)}
        artifact = Artifact.open(self.converted(dit="bf16"))
        other = Case(self._folder, None, 2.0)
        return contributions(artifact, original, other.request(num_clip=1), chosen, device="cpu", quiet=True)

    def converted(self, **options: Any) -> Path:
        lora = self._root / "LiveAvatar" / "liveavatar.safetensors"
        out = self._folder / "artifact"
        return convert(self._root, out, **{"precision": "bf16", "lora": lora, "overwrite": True} | options)

    def error(self, artifact: Path) -> float:
        """Of the DiT's output, all steps of all blocks taken together."""
        pipeline = AvatarPipeline.from_artifact(artifact, device="cpu")
        forced = force(pipeline, self._case.request(), self._teacher, blocks=self._blocks, quiet=True)
        return forced.values["velocity_error"]


def measure(folder: Path, only: Sequence[str], *, blocks: int, seconds: float) -> dict[str, Any]:
    face = Face(folder, blocks=blocks, seconds=seconds)
    parts: dict[str, Callable[[Face], Any]] = {"units": units, "budgets": budgets}
    found = {name: parts[name](face) for name in only}
    return {
        "question": "which of the DiT's Linears are worth more bytes?",
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(torch.device("cpu")) | {"processor": processor()},
        "blocks": blocks,
        **found,
    }


def units(face: Face) -> dict[str, Any]:
    """Each alone, and all together."""
    artifact = face.converted(dit="int8")
    tensors = Artifact.open(artifact).component("dit").facts["tensors"]
    whole, members = face.error(artifact), defaultdict(list)
    for name, facts in tensors.items():
        if facts["scheme"].startswith("int8"):
            members[unit_of(name)].append(name)
    rows = []
    for unit, names in members.items():
        error = face.error(face.converted(apart=dict.fromkeys(names, "int8")))
        weights = statistics.fmean(tensors[name]["relative_error"] ** 2 for name in names)
        rows.append(
            {
                "unit": unit,
                "role": role_of(unit),
                "output_error": error,
                "weight_error": math.sqrt(weights),
                "sensitivity": error**2 / weights,
            }
        )
        print(f"{unit}: {error:.3%}", file=sys.stderr, flush=True)
    return {
        "uniform_int8": whole,
        "sum_of_squares": math.sqrt(math.fsum(row["output_error"] ** 2 for row in rows)),
        "uniform_fp8": face.error(face.converted(dit="fp8")),
        "rows": rows,
        "by_role": by_role(rows),
    }


def by_role(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The mean sensitivity of a kind of Linears, and their part in the square of the error of all."""
    of: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        of[row["role"]].append(row)
    total = math.fsum(row["output_error"] ** 2 for row in rows)
    return {
        role: {
            "sensitivity": statistics.fmean(row["sensitivity"] for row in own),
            "share": math.fsum(row["output_error"] ** 2 for row in own) / total,
        }
        for role, own in of.items()
    }


def budgets(face: Face) -> list[dict[str, Any]]:
    """What is between the two uniform ones."""

    def nbytes(artifact: Path) -> int:
        return Artifact.open(artifact).component("dit").path.stat().st_size

    lowest, highest = (nbytes(face.converted(dit=dit)) for dit in ("int8", "bf16"))
    rows, measured = [], face.parts()
    for share in SHARES:
        target = round(lowest + share * (highest - lowest))
        row: dict[str, Any] = {"target_bytes": target}
        for how, parts in (("table", None), ("run", measured)):
            artifact = face.converted(dit="auto", target_bytes=target, error_parts=parts)
            choice = Artifact.open(artifact).component("dit").facts["choice"]
            row[how] = {
                "bytes": nbytes(artifact),
                "times_int8": nbytes(artifact) / lowest,
                "predicted_error": choice["predicted_error"],
                "output_error": face.error(artifact),
            }
        rows.append(row)
        print(f"{target} bytes: {row}", file=sys.stderr, flush=True)
    return rows


def markdown(result: dict[str, Any]) -> str:
    """Tables of kinds, of layers, and of budgets."""
    lines = []
    if "units" in result:
        lines += _of_units(result["units"])
    if "budgets" in result:
        lines += [
            "| bytes, of uniform int8's | by the table: predicted | measured | by a run: predicted | measured |",
            "| ---: | ---: | ---: | ---: | ---: |",
        ]
        for row in result["budgets"]:
            cells = [f"{row[how][of]:.2%}" for how in ("table", "run") for of in ("predicted_error", "output_error")]
            lines.append(f"| {row['table']['times_int8']:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _of_units(found: dict[str, Any]) -> list[str]:
    rows = found["rows"]
    layers = sorted({row["unit"].split(".")[1] for row in rows if row["unit"].startswith("blocks.")}, key=int)
    lines = [
        f"uniform int8 {found['uniform_int8']:.2%}, root of the sum of squares {found['sum_of_squares']:.2%}, uniform "
        f"fp8 {found['uniform_fp8']:.2%}",
        "",
        "| alone in int8 | " + " | ".join(f"layer {layer}" for layer in layers) + " | share of the squares |",
        "| --- " + "| ---: " * (len(layers) + 1) + "|",
    ]
    errors = {(row["role"], row["unit"].split(".")[1]): row["output_error"] for row in rows if "block" in row["unit"]}
    for role, of in found["by_role"].items():
        cells = [f"{errors[role, layer]:.3%}" if (role, layer) in errors else "" for layer in layers]
        lines.append(f"| {role} | {' | '.join(cells)} | {of['share']:.1%} |")
    return [*lines, ""]


if __name__ == "__main__":
    main()
