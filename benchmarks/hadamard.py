"""Would a grouped Hadamard rotation before int8 pay? Error with and without, and what it costs.

python benchmarks/hadamard.py [--case tests/golden/pipeline_tiny] [--out benchmarks/results/hadamard_cpu.json]

A rotation of each group of neighbouring input channels is orthogonal: (x H) (W H)^T = x W^T. Folded into the weights
at ``convert --rotate`` and applied to activations in the passes that quantize them, it spreads a large channel over its
group. Groups of 16 are what is built; the others are measured for comparison.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from lowvram.infer import machine
from lowvram.loading import weights
from lowvram.pipeline import AvatarPipeline, Request
from lowvram.recorder import TensorRecorder
from lowvram_kernels.linear import linear_w8a8
from lowvram_kernels.rows import quantize_rows
from lowvram_quantize.convert import convert
from lowvram_quantize.schemes import dit_scheme

ROOT = Path(__file__).parents[1]
STRENGTHS = (1, 4, 16, 64, 256)  # how much larger an outlier channel is than the others
CASES = ((420, 1), (1, 1), (2, 1), (420, 16), (420, 64))  # (seed, strength) of the reference case
SHARE = 0.01  # of the channels are outliers
Tensor = torch.Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=Path, default=ROOT / "tests" / "golden" / "pipeline_tiny")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "question": "does a grouped Hadamard rotation before int8 win on error at under 3 % of the time?",
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(torch.device("cpu")) | {"threads": 1},
        "synthetic": [synthetic(strength) for strength in STRENGTHS],
        "pipeline": pipeline_errors(options.case),
        "cost": cost(),
    }
    text = json.dumps(result, indent=1, allow_nan=False)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def product(x: Tensor, weight_NK: Tensor, group: int) -> Tensor:
    """x W^T as an artifact computes it, of a weight that ``convert`` would have rotated and quantized."""
    group = math.gcd(group, x.shape[-1])
    q, scale = quantize_rows(weight_NK, torch.int8, group=group)
    return linear_w8a8(x, q, scale[:, 0], None, group=group)


def error(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact.double()).norm() / exact.double().norm()).item()


def factors(width: int, strength: float) -> Tensor:
    """1 a channel, and ``strength`` for a random few, at least one."""
    out = torch.ones(width)
    chosen = torch.randperm(width, generator=torch.Generator().manual_seed(width))[: max(1, round(SHARE * width))]
    out[chosen] = strength
    return out


def synthetic(strength: float) -> dict[str, Any]:
    """One Linear of 2048 x 2048. ``activations``: some channels are larger and weigh as much as the others, so that
    they make up the result; ``balanced``: their weights are smaller in proportion, as where training had its way."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(512, 2048, generator=generator) for _ in range(2))
    scale = factors(2048, strength)
    kinds = {"activations": (x * scale, w), "balanced": (x * scale, w / scale)}
    errors = {}
    for kind, (a, b) in kinds.items():
        exact = a.double() @ b.double().t()
        errors[kind] = {str(group): error(product(a, b, group), exact) for group in (1, 16, 128, 512)}
    return {"strength": strength, "error_by_group": errors}


class OutlierLinear(nn.Linear):
    """int8 in place of a Linear, with rotated groups and with outlier channels that change nothing but its rounding."""

    group, strength = 1, 1.0

    def forward(self, x: Tensor) -> Tensor:
        scale = factors(x.shape[-1], self.strength)
        return product(x * scale, self.weight / scale, self.group) + self.bias


def pipeline_errors(case: Path) -> list[dict[str, Any]]:
    """Latents' relative error of the reference case with the DiT in int8, plain and rotated: of artifacts, and, with
    outliers that no checkpoint at hand has, of a float32 artifact whose layers round what such a one would."""
    settings = json.loads((case / "case.json").read_text())
    names = ("prompt", "size", "infer_frames", "num_clip", "sample_steps", "base_seed", "cond_rope_distance")
    request = Request(
        image=case / "inputs/portrait.png", audio=case / "inputs/speech.wav", **{name: settings[name] for name in names}
    )
    with tempfile.TemporaryDirectory() as folder:
        made = artifacts(case, Path(folder), settings["lora_alpha"])
        rows = []
        for seed, strength in CASES:
            seeded = dataclasses.replace(request, base_seed=seed)
            exact = latents(made["fp32"], seeded)
            if strength == 1:
                found = {group: latents(made[group], seeded) for group in ("1", "16")}
            else:
                found = {group: latents(made["fp32"], seeded, int(group), strength) for group in ("1", "16")}
            errors = {group: error(value, exact) for group, value in found.items()}
            rows.append({"base_seed": seed, "strength": strength, "error_by_group": errors})
    return rows


def artifacts(case: Path, folder: Path, alpha: float) -> dict[str, Path]:
    """By the size of a group: the DiT in int8, rotated or not; and all in float32."""
    options = {"precision": "fp32", "lora": case / "ckpt" / "LiveAvatar" / "liveavatar.safetensors"}
    kinds: dict[str, dict[str, Any]] = {"fp32": {}, "1": {"dit": "int8"}, "16": {"dit": "int8", "rotate": True}}
    return {
        name: convert(case / "ckpt", folder / name, lora_alpha=alpha, **options, **kind) for name, kind in kinds.items()
    }


def latents(artifact: Path, request: Request, group: int = 0, strength: float = 1.0) -> Tensor:
    """``group`` 0: as the artifact has it."""
    build, recorder = weights.build_dit, TensorRecorder()

    def with_outliers(component: Any) -> nn.Module:
        dit = build(component)
        for name, module in dit.named_modules():
            if isinstance(module, nn.Linear) and dit_scheme(f"{name}.weight", "int8").name == "int8":
                module.__class__ = type("Outliers", (OutlierLinear,), {"group": group, "strength": strength})
        return dit

    with mock.patch("lowvram.denoise.denoiser.build_dit", with_outliers if group else build):
        for _ in AvatarPipeline.from_artifact(artifact, device="cpu").stream(request, recorder=recorder):
            pass
    return recorder.tensors()["latents"]


# (K, N, products of the same input, times in a layer) of the 14B model: q k v; o twice and the text's q; feed-forward
LAYER = ((5120, 5120, 3, 1), (5120, 5120, 1, 3), (5120, 13824, 1, 1), (13824, 5120, 1, 1))
ROWS = 192


def cost() -> dict[str, Any]:
    """Time of a layer's products of the 14B model with few rows, and of the passes that quantize their inputs."""
    groups = (1, 16, 128)
    products, passes = 0.0, dict.fromkeys(groups, 0.0)
    for depth, columns, sharing, times in LAYER:
        x, w, bias = torch.randn(ROWS, depth), torch.randn(columns, depth), torch.randn(columns)
        q, scale = quantize_rows(w, torch.int8)
        products += times * sharing * median_ms(lambda x=x, q=q, s=scale[:, 0], b=bias: linear_w8a8(x, q, s, b))
        for group in groups:
            passes[group] += times * median_ms(
                lambda x=x, group=group: quantize_rows(x, torch.int8, group=group), repeats=25
            )
    multiply_adds = sum(depth * columns * sharing * times for depth, columns, sharing, times in LAYER)
    channels = sum(depth * times for depth, _, _, times in LAYER)
    return {
        "layer": f"int8 Linears of a 14B layer, {ROWS} rows, float32 in and out; attention left out",
        "products_ms": products,
        "products_multiply_adds_a_token": multiply_adds,
        "quantize_rows_ms": passes[1],
        # On a GPU the passes that quantize hold a row in registers already: rotating there adds no bytes.
        "rotations": [
            {
                "group": group,
                "quantize_rows_ms": passes[group],
                "additional_ms": passes[group] - passes[1],
                "share_of_products": (passes[group] - passes[1]) / products,
                "additions_a_token_in_triton": channels * int(math.log2(group)),
                "multiply_adds_a_token_in_torch": channels * group,
            }
            for group in groups[1:]
        ],
    }


def median_ms(call: Callable[[], Any], repeats: int = 7) -> float:
    times = []
    with torch.inference_mode():
        for _ in range(repeats + 2):
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
    return statistics.median(times[2:]) * 1e3


if __name__ == "__main__":
    main()
