"""How far from fp32 are int8 and fp8? Latent relative error of a reference case, every step through the command line.

python benchmarks/fidelity.py [--case tests/golden/pipeline_tiny] [--out benchmarks/results/fidelity_cpu.json]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """A way to convert and to run, and the latent relative error against fp32 that it has to stay under."""

    title: str
    options: tuple[str, ...]
    limit: float
    infer: tuple[str, ...] = ()


BASELINE = ("--precision", "fp32")
VARIANTS = {
    "int8-dit": Variant(title="DiT int8, others fp32", options=(*BASELINE, "--dit", "int8"), limit=0.01),
    "int8-not-rotated": Variant(
        title="DiT int8 not rotated, others fp32", options=(*BASELINE, "--dit", "int8", "--rotate", "none"), limit=0.01
    ),
    "fp8-dit": Variant(title="DiT fp8, others fp32", options=(*BASELINE, "--dit", "fp8"), limit=0.04),
    "int8-rings": Variant(title="all fp32, KV rings int8", options=BASELINE, limit=0.005, infer=("--kv", "int8")),
    "int8": Variant(title="every component int8", options=("--precision", "int8"), limit=0.03),
    "fp8": Variant(title="every component fp8", options=("--precision", "fp8"), limit=0.08),
    "int8-all": Variant(
        title="every component int8, KV rings int8", options=("--precision", "int8"), limit=0.03, infer=("--kv", "int8")
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=Path, default=ROOT / "tests" / "golden" / "pipeline_tiny")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options.case.resolve(), Path(folder))
    print(markdown(result["variants"]))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    missed = [row["title"] for row in result["variants"] if not row["latent_error"] < row["limit"]]
    if missed:
        sys.exit(f"not under the limit: {', '.join(missed)}")


def measure(case: Path, folder: Path) -> dict[str, Any]:
    """Make the fp32 run and each variant's in ``folder``; compare their dumped tensors."""
    import torch

    from lowvram.infer import machine

    baseline = run(case, folder, "fp32", Variant(title="fp32", options=BASELINE, limit=0))
    return {
        "question": "how far are the latents of int8 and fp8 artifacts from those of the fp32 one?",
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(torch.device("cpu")),
        "case": case.name,
        "variants": [score(case, folder, name, variant, baseline) for name, variant in VARIANTS.items()],
    }


def score(case: Path, folder: Path, name: str, variant: Variant, baseline: Path) -> dict[str, Any]:
    from lowvram.compare.comparison import compare

    result = compare(run(case, folder, name, variant), baseline)
    return {
        "name": name,
        "title": variant.title,
        "options": " ".join((*variant.options, *variant.infer)),
        "limit": variant.limit,
        **result.to_json()["values"],
        "blocks": [block.relative_error for block in result.blocks],
        "conditions": {tensor.name: tensor.relative_error for tensor in result.tensors if tensor.name != "frames"},
    }


def run(case: Path, folder: Path, name: str, variant: Variant) -> Path:
    """Convert the case's checkpoint, infer with the case's settings; return the dumped tensors."""
    settings = json.loads((case / "case.json").read_text())
    artifact, dump = folder / f"{name}-artifact", folder / f"{name}.safetensors"
    lora = case / "ckpt" / "LiveAvatar" / "liveavatar.safetensors"
    lowvram(
        "convert", *variant.options, "--ckpt-dir", case / "ckpt", "--out", artifact,
        "--lora", lora, "--lora-alpha", settings["lora_alpha"],
    )  # fmt: skip
    names = ("size", "infer_frames", "num_clip", "sample_steps", "base_seed", "cond_rope_distance", "prompt")
    same = [part for key in names for part in (f"--{key}", settings[key])]
    lowvram(
        "infer", "--quiet", "--device", "cpu", "--model", artifact, *same,
        "--image", case / "inputs" / "portrait.png", "--audio", case / "inputs" / "speech.wav",
        "--out", folder / f"{name}.mp4", "--dump-tensors", dump, *variant.infer,
    )  # fmt: skip
    return dump


def lowvram(*arguments: object) -> None:
    command = [sys.executable, "-m", "lowvram", *map(str, arguments)]
    done = subprocess.run(command, cwd=tempfile.gettempdir(), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{shlex.join(command)} failed with exit code {done.returncode}:\n{done.stderr}")


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| artifact | latent error | worst block | limit | frames' PSNR |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        psnr = row["psnr"] if isinstance(row["psnr"], str) else f"{row['psnr']:.1f} dB"
        lines.append(
            f"| {row['title']} | {row['latent_error']:.2%} | {row['latent_error_max']:.2%} | "
            f"{row['limit'] * 100:g}% | {psnr} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
