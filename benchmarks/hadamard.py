"""Would a grouped Hadamard rotation before int8 pay? Error with and without, and what it costs.

python benchmarks/hadamard.py [--case tests/golden/pipeline_tiny] [--out benchmarks/results/hadamard_cpu.json]

A rotation of each group of neighbouring input channels is orthogonal: (x H) (W H)^T = x W^T. Folded into the weights
beforehand and applied to activations before they are rounded, it spreads a large channel over its group. Rounding is
emulated in float32, where products of 8-bit numbers are exact up to the order of sums.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
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

from lowvram import weights
from lowvram.infer import machine
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


@functools.cache
def hadamard(size: int) -> Tensor:
    """Orthogonal and symmetric [size, size]; ``size`` is a power of two."""
    one = torch.ones(1, 1)
    while len(one) < size:
        one = torch.cat([torch.cat([one, one], 1), torch.cat([one, -one], 1)])
    return one / math.sqrt(size)


def rotated(x: Tensor, group: int) -> Tensor:
    """[..., K] with each group of channels rotated; of the largest power of two up to ``group`` that divides K."""
    group = math.gcd(x.shape[-1], group)
    return x if group == 1 else (x.unflatten(-1, (-1, group)) @ hadamard(group)).flatten(-2)


def rounded(x: Tensor) -> Tensor:
    q, scale = quantize_rows(x.reshape(-1, x.shape[-1]), torch.int8)
    return (q * scale).view(x.shape)


def product(x: Tensor, weight_NK: Tensor, group: int) -> Tensor:
    """x W^T with both rounded to int8 behind the rotation."""
    return rounded(rotated(x, group)) @ rounded(rotated(weight_NK, group)).t()


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


class EmulatedLinear(nn.Linear):
    """int8 in place of a Linear, with rotated groups and with outlier channels that change nothing but its rounding."""

    group, strength = 1, 1.0

    def forward(self, x: Tensor) -> Tensor:
        scale = factors(x.shape[-1], self.strength)
        return product(x * scale, self.weight / scale, self.group) + self.bias


def pipeline_errors(case: Path) -> list[dict[str, Any]]:
    """Latents' relative error of the reference case with every 8-bit Linear of the DiT emulated."""
    settings = json.loads((case / "case.json").read_text())
    names = ("prompt", "size", "infer_frames", "num_clip", "sample_steps", "base_seed", "cond_rope_distance")
    request = Request(
        image=case / "inputs/portrait.png", audio=case / "inputs/speech.wav", **{name: settings[name] for name in names}
    )
    lora = case / "ckpt" / "LiveAvatar" / "liveavatar.safetensors"
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(folder) / "fp32"
        convert(case / "ckpt", artifact, precision="fp32", lora=lora, lora_alpha=settings["lora_alpha"])
        rows = []
        for seed, strength in CASES:
            seeded = dataclasses.replace(request, base_seed=seed)
            exact = latents(artifact, seeded)
            errors = {str(group): error(latents(artifact, seeded, group, strength), exact) for group in (1, 8, 16)}
            rows.append({"base_seed": seed, "strength": strength, "error_by_group": errors})
    return rows


def latents(artifact: Path, request: Request, group: int = 0, strength: float = 1.0) -> Tensor:
    """``group`` 0: as the artifact has it."""
    build, recorder = weights.build_dit, TensorRecorder()

    def emulated(component: Any) -> nn.Module:
        dit = build(component)
        for name, module in dit.named_modules():
            if isinstance(module, nn.Linear) and dit_scheme(f"{name}.weight", "int8").dtype is torch.int8:
                module.__class__ = type("Emulated", (EmulatedLinear,), {"group": group, "strength": strength})
        return dit

    with mock.patch("lowvram.pipeline.build_dit", emulated if group else build):
        for _ in AvatarPipeline.from_artifact(artifact, device="cpu").stream(request, recorder=recorder):
            pass
    return recorder.tensors()["latents"]


# (K, N, products of the same input, times in a layer) of the 14B model: q k v; o twice and the text's q; feed-forward
LAYER = ((5120, 5120, 3, 1), (5120, 5120, 1, 3), (5120, 13824, 1, 1), (13824, 5120, 1, 1))
ROWS = 192


def cost() -> dict[str, Any]:
    """Time of a layer's products of the 14B model with few rows, and of the rotations before them; and their counts."""
    groups = (16, 128)
    products, turns = 0.0, dict.fromkeys(groups, 0.0)
    for depth, columns, sharing, times in LAYER:
        x, w, bias = torch.randn(ROWS, depth), torch.randn(columns, depth), torch.randn(columns)
        q, scale = quantize_rows(w, torch.int8)
        products += times * sharing * median_ms(lambda x=x, q=q, s=scale[:, 0], b=bias: linear_w8a8(x, q, s, b))
        for group in groups:
            turns[group] += times * median_ms(lambda x=x, group=group: rotated(x, group))
    multiply_adds = sum(depth * columns * sharing * times for depth, columns, sharing, times in LAYER)
    channels = sum(depth * times for depth, _, _, times in LAYER)
    return {
        "layer": f"int8 Linears of a 14B layer, {ROWS} rows, float32 in and out; attention left out",
        "products_ms": products,
        "products_multiply_adds_a_token": multiply_adds,
        # The passes that quantize hold a row in registers already, so that rotating there adds no bytes.
        "rotations": [
            {
                "group": group,
                "ms": ms,
                "share_of_products": ms / products,
                "additions_a_token": channels * int(math.log2(group)),
                "multiply_adds_a_token_as_a_product": channels * group,
                "additional_bytes": 0,
            }
            for group, ms in turns.items()
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
