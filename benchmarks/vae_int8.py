"""Would convolutions of the VAE's decoder do in int8, activations too, and what would they bring? Simulated.

python benchmarks/vae_int8.py [--out benchmarks/results/vae_int8_cpu.json]

Two decoders, computed in float32: the trained tiny face's on latents of a drawn, talking face, and the random one of
the reference pipeline on its latents. Weights have a scale an output channel. An implicit product adds up over window
and channels in integers, so that activations can have one scale a frame, and factors of channels that go into the
weights ("smoothed", here by the very activations, the best that a calibration could do; "rotated", in groups of
channels). A scale a pixel would have to be one for each whole window: it stands in the table as what could be reached
at the most. Each variant with all convolutions of a window behind the first in int8, and with those at full resolution
left alone. What it would bring is counted over the published decoder; rates are those of data sheets.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from vae_counts import decoder_bytes, decoder_counts

from lowvram.infer import machine
from lowvram.loading.encoders import load_vae
from lowvram.media.samples import Expression, draw_portrait
from lowvram.planning import CARDS
from lowvram_kernels.rotation import largest_group, rotated
from lowvram_models.constants import PRIMING_LATENTS
from lowvram_models.vae import StreamingVAE
from lowvram_quantize.convert import convert
from lowvram_quantize.format import Artifact
from lowvram_quantize.trained import write_trained

Tensor = torch.Tensor
GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden" / "pipeline_tiny"
BAR = 0.01
LEVELS = 127
LEAST_CHANNELS = 4  # of the published decoder all but the first have 96 and more
BLOCK_LATENTS = 3
HEIGHT, WIDTH = 384, 704
CARDS_HERE = ("rtx3090", "rtx4090", "rtx5090", "h100")

# x [B, C, T, H, W] and weight [N, C, ...] -> both as they are multiplied.
Rounding = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def rounded(x: Tensor, dims: tuple[int, ...] | None) -> Tensor:
    """To 255 levels, with a scale for what lies along ``dims``; None: one scale."""
    scale = (x.abs().amax() if dims is None else x.abs().amax(dims, keepdim=True)) / LEVELS
    return (x / scale.clamp_min(1e-30)).round_().mul_(scale)


def by_row(weight: Tensor) -> Tensor:
    return rounded(weight, tuple(range(1, weight.ndim)))


def weights_alone(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x, by_row(weight)


def one_scale(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return rounded(x, None), by_row(weight)


def scale_a_frame(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return rounded(x, (1, 3, 4) if x.ndim == 5 else (1, 2, 3)), by_row(weight)


def smoothed(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Channels divided by the root of how much larger they are than their weights."""
    others = [dim for dim in range(x.ndim) if dim != 1]
    factor = (
        x.abs().amax(others) / weight.abs().amax([d for d in range(weight.ndim) if d != 1]).clamp_min(1e-12)
    ).sqrt()
    factor = factor.clamp_min(1e-6).view(-1, *[1] * (x.ndim - 2))
    return rounded(x / factor, None) * factor, by_row(weight * factor) / factor


def turned(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Groups of up to 256 channels rotated; back again, because what is multiplied here are floats."""
    group = largest_group(x.shape[1])

    def turn(values: Tensor) -> Tensor:
        return rotated(values.movedim(1, -1).contiguous(), group).movedim(-1, 1)

    return turn(rounded(turn(x), None)), turn(by_row(turn(weight)))


def scale_a_pixel(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return rounded(x, (1,)), by_row(weight)


VARIANTS: dict[str, tuple[str, Rounding]] = {
    "weights": ("weights alone, as artifacts have them", weights_alone),
    "tensor": ("one scale of activations", one_scale),
    "frame": ("one scale a frame", scale_a_frame),
    "smoothed": ("one scale, smoothed", smoothed),
    "rotated": ("one scale, rotated", turned),
    "pixel": ("a scale a pixel (no implicit product)", scale_a_pixel),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cases = {"face": face(Path(folder)), "golden": golden(Path(folder))}
        exact = {name: decoded(*case) for name, case in cases.items()}
        rows = [row for variant in VARIANTS for row in rows_of(variant, cases, exact)]
    counts = counted()
    print(markdown(rows), "", counts_markdown(counts), sep="\n")
    if given.out:
        result = {"machine": machine(torch.device("cpu")), "bar": BAR, "variants": rows, "counts": counts}
        given.out.write_text(json.dumps(result, indent=1) + "\n")


Decoded = tuple[StreamingVAE, Tensor, Tensor]
"""A VAE, latents to prime its decoder with, and latents of a block and more [16, k, h, w]."""


def face(folder: Path) -> Decoded:
    """Latents of a face that opens its mouth and closes its eyes, of 256 x 256 pixels."""
    vae = vae_of(write_trained(folder / "face"), folder / "face-vae")
    frames = []
    for index in range(25):
        expression = Expression(mouth=0.5 - 0.5 * math.cos(index), eyes_closed=max(0.0, math.sin(index / 3)))
        frames.append(np.asarray(draw_portrait(256, 256, expression=expression)))
    video = torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2).float() / 127.5 - 1
    latents = vae.encode(video)
    return vae, latents[:, :-BLOCK_LATENTS], latents[:, -BLOCK_LATENTS:]


def golden(folder: Path) -> Decoded:
    vae = vae_of(GOLDEN / "ckpt", folder / "golden-vae")
    outputs = load_file(GOLDEN / "outputs.safetensors")
    latents = torch.cat(list(outputs["latents"]), dim=1)
    return vae, outputs["motion_latents"][0, :, :PRIMING_LATENTS], latents


def vae_of(checkpoint: Path, out: Path) -> StreamingVAE:
    convert(checkpoint, out, vae="fp32", components=("vae",))
    return load_vae(Artifact.open(out), torch.device("cpu"), torch.float32)


def rows_of(variant: str, cases: dict[str, Decoded], exact: dict[str, Tensor]) -> Iterator[dict[str, Any]]:
    title, rounding = VARIANTS[variant]
    for where in ("all", "not at full resolution"):
        row: dict[str, Any] = {"variant": variant, "title": title, "where": where}
        for name, (vae, before, latents) in cases.items():
            with rounding_in(vae, rounding, full=where == "all"):
                frames = decoded(vae, before, latents)
            off = (frames - exact[name]).double()
            row[name] = {
                "error": float(off.norm() / exact[name].double().norm()),
                "psnr": -10 * math.log10(float(off.square().mean()) / 4),
            }
        yield row


def decoded(vae: StreamingVAE, before: Tensor, latents: Tensor) -> Tensor:
    decoder = vae.start_decoder()
    decoder.prime(before)
    return decoder.decode(latents)


@contextmanager
def rounding_in(vae: StreamingVAE, rounding: Rounding, *, full: bool) -> Iterator[None]:
    """Round what the decoder's wide convolutions multiply; ``full``: at full resolution too."""
    decoder: Any = vae.vae.decoder
    convolutions = [m for m in decoder.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]
    last = {id(m) for part in (decoder.up_blocks[-1], decoder.conv_out) for m in part.modules()}
    chosen = []
    for conv in convolutions:
        wide = conv is not decoder.conv_in and conv.weight.shape[1] >= LEAST_CHANNELS and conv.weight[0, 0].numel() > 1
        if wide and (full or id(conv) not in last):
            chosen.append(conv)
            inner = conv._conv_forward

            def forward(self: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None, inner: Any = inner) -> Tensor:
                found: Tensor = inner(*rounding(x, weight), bias)
                return found

            conv._conv_forward = MethodType(forward, conv)
    try:
        yield
    finally:
        for conv in chosen:
            del conv._conv_forward


def counted() -> dict[str, Any]:
    """Of the published decoder at 704 x 384 pixels, a block: what int8 could compute, and its seconds at full rates."""
    counts = decoder_counts(HEIGHT, WIDTH)
    operations = BLOCK_LATENTS * counts.products
    share = counts.wide / counts.products
    cards = {}
    for name in CARDS_HERE:
        rates = CARDS[name].rates
        cards[name] = {
            "bf16_s": operations / rates.bf16,
            "int8_s": operations * (share / rates.int8 + (1 - share) / rates.bf16),
            "passes_s": BLOCK_LATENTS * counts.pass_bytes / (rates.memory or math.inf),
        }
    return {
        "size": f"{WIDTH}*{HEIGHT}",
        "operations": operations,
        "share_int8": share,
        "pass_bytes": BLOCK_LATENTS * counts.pass_bytes,
        "convolution_bytes": BLOCK_LATENTS * counts.product_bytes,
        "launches": BLOCK_LATENTS * counts.launches,
        "passes": {name: BLOCK_LATENTS * nbytes for name, nbytes in counts.by_name.items()},
        "weights": decoder_bytes(),
        "cards": cards,
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| int8 | convolutions | face: error | PSNR | random: error | PSNR |",
        "| --- | --- " + "| ---: " * 4 + "|",
    ]
    for row in rows:
        cells = [f"{row[n]['error']:.2%} | {row[n]['psnr']:.1f} dB" for n in ("face", "golden")]
        lines.append(f"| {row['title']} | {row['where']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def counts_markdown(counts: dict[str, Any]) -> str:
    lines = [
        f"A block at {counts['size']}: {counts['operations'] / 1e12:.1f} tera operations in convolutions, "
        f"{counts['share_int8']:.1%} of them in int8; "
        f"{counts['pass_bytes'] / 1e9:.0f} GB moved by passes between them.",
        "",
        "| card | products in bf16 | in int8 | passes between them |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, facts in counts["cards"].items():
        lines.append(f"| {name} | " + " | ".join(f"{facts[k]:.3f} s" for k in ("bf16_s", "int8_s", "passes_s")) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
