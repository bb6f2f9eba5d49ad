"""Train the VAE's decoder on drawn faces that speak: ``python -m training.tiny_face.train_vae --out FOLDER``.

The encoder is made, not trained (``components``), so the DiT need not wait for the decoder.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lowvram.media.samples import Expression, synth_voice
from training.tiny_face import faces, motion
from training.tiny_face.components import set_encoder
from training.tiny_face.optim import Muon, rate
from training.tiny_face.run import Run
from training.tiny_face.vae import TrainableVAE

BEGIN, POOL = 60, 400
FRAMES = 9
STEPS = 2400
NOISE = 0.08
"""Added to latents of unit size: the DiT will not hit them exactly."""
STAGES = ((0.35, 2), (1.0, 8))
"""Until this share of the steps, residual branches run up to that scale (``TrainableVAE.activate``)."""
PEOPLE = 30
"""Whose faces the encoder's components are made from."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Crops:
    """What a step learns from: their number, their frames (4k + 1, at most ``FRAMES``), and their sides in px, one step
    after the other."""

    count: int = 2
    frames: int = FRAMES
    sides: tuple[int, ...] = (48, 48, 48, 64)


CROPS = Crops()


class Clips:
    """Clips [3, 9, size, size]: new ones all the time, the last ``POOL`` of them kept; all follows from the seed."""

    def __init__(self, seed: int, size: int = faces.SIZE):
        self._seed, self._size = seed, size
        self._kept: list[Tensor] = []
        self._weights: list[Tensor] = []

    def batch(self, step: int, crops: Crops) -> tuple[Tensor, Tensor]:
        """Crops [count, 3, frames, side, side] in [-1, 1], half of them of the face; what each pixel's error weighs."""
        if len(self._kept) < BEGIN or step % 4 == 0:
            self._add(step)
        draw, crop = np.random.default_rng([self._seed, step, 1]), min(crops.sides[step % len(crops.sides)], self._size)
        clips, weights = [], []
        for _ in range(crops.count):
            which = int(draw.integers(len(self._kept)))
            top, left = self._corner(draw, crop)
            window = (..., slice(top, top + crop), slice(left, left + crop))
            clips.append(self._kept[which][window][:, : crops.frames])
            weights.append(self._weights[which][window])
        return torch.stack(clips).float() / 127.5 - 1, torch.stack(weights)

    def _corner(self, draw: np.random.Generator, crop: int) -> tuple[int, int]:
        room = self._size - crop
        if draw.uniform() < 0.5:
            return int(draw.integers(room + 1)), int(draw.integers(room + 1))
        middle = np.array([0.6, 0.5]) * self._size - crop / 2 + draw.uniform(-0.12, 0.12, 2) * self._size
        top, left = (int(value) for value in np.clip(middle, 0, room))
        return top, left

    def _add(self, step: int) -> None:
        clip, weight = clip_of(self._seed * 100_000 + step, self._size)
        self._kept.append(clip)
        self._weights.append(weight)
        del self._kept[:-POOL], self._weights[:-POOL]


def clip_of(number: int, size: int = faces.SIZE) -> tuple[Tensor, Tensor]:
    """(uint8 [3, 9, size, size], weights [1, 1, size, size]): a person at rest, then eight frames of speech."""
    draw = np.random.default_rng([number, 21])
    who, curves = faces.person(number), motion.controls(synth_voice(2.0, speech=faces.speech(number)))
    spoken = motion.expressions(curves, int(draw.integers(2, 40)), FRAMES - 1)
    shown: list[Expression] = [faces.at_rest(number) if draw.uniform() < 0.3 else spoken[0], *spoken]
    frames = np.stack([faces.picture(who, expression, size) for expression in shown])
    return torch.from_numpy(frames).permute(3, 0, 1, 2).contiguous(), weights(size)


def weights(size: int) -> Tensor:
    """What errors weigh [1, 1, size, size]: more at eyes and mouth of the default face."""
    y, x = torch.meshgrid(torch.arange(size) / size, torch.arange(size) / size, indexing="ij")
    mouth = ((x - 0.5) / 0.10).square() + ((y - 0.73) / 0.10).square() < 1
    eyes = ((x - 0.5) / 0.16).square() + ((y - 0.53) / 0.06).square() < 1
    return (1.0 + 2.0 * (mouth | eyes))[None, None]


def new_vae(size: int = faces.SIZE) -> TrainableVAE:
    """A VAE whose encoder is made from pictures of ``size`` pixels, and whose decoder knows nothing yet."""
    vae = TrainableVAE()
    set_encoder(vae, torch.stack([clip_of(number, size)[0] for number in range(PEOPLE)]).float() / 127.5 - 1)
    return vae


def train(
    root: Path, *, steps: int, seed: int = 0, peak: float = 8e-3, size: int = faces.SIZE, crops: Crops = CROPS
) -> TrainableVAE:
    """Train in ``root/vae``, or go on there; returns the VAE as it is then, its latents not yet those published."""
    torch.manual_seed(seed)
    vae = new_vae(size)
    optimizer = Muon([*vae.vae.decoder.parameters(), *vae.vae.post_quant_conv.parameters()])
    run, clips = Run(root, "vae", steps, {"vae": vae, "optimizer": optimizer}), Clips(seed, size)

    def one(step: int) -> dict[str, float]:
        vae.activate(next(scale for until, scale in STAGES if step < until * steps))
        video, weight = clips.batch(step, crops)
        loss, facts = _loss(vae, video, weight, step)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps, peak)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return facts

    run.loop(one)
    vae.activate(8)
    return vae


def _loss(vae: TrainableVAE, video: Tensor, weight: Tensor, seed: int) -> tuple[Tensor, dict[str, float]]:
    with torch.no_grad():
        latent = vae.encode(video)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed))
    error = vae.decode(latent + NOISE * noise) - video
    # The first frame of a stream is never shown: it only has to leave the right things behind.
    in_time = torch.cat([torch.full((1,), 0.3), torch.ones(video.shape[2] - 1)]).view(1, 1, -1, 1, 1)
    weight = weight * in_time
    squares, sizes = ((e * weight).mean() / weight.mean() for e in (error.square(), error.abs()))
    loss = 4 * squares + 0.25 * sizes
    psnr = -10 * torch.log10(error[:, :, 1:].detach().square().mean() / 4)
    return loss, {"loss": loss.item(), "psnr": psnr.item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    train(given.out, steps=given.steps, seed=given.seed)


if __name__ == "__main__":
    main()
