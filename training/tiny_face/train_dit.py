"""Train the DiT: ``python -m training.tiny_face.train_dit --out FOLDER`` needs ``latents.pt`` there.

Flow matching towards the one right answer: the face that the voice asks for, of the person in the sink. Noise levels
are those that four Euler steps visit. Inputs are led astray on purpose, and the wanted velocity leads back, so that
errors of earlier steps and blocks do not add up.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from lowvram_models.dit import CausalDiT
from training.tiny_face import latents
from training.tiny_face.causal import BLOCK, Conditions, velocity
from training.tiny_face.optim import Muon, rate
from training.tiny_face.run import Run
from training.tiny_face.shapes import contexts, new_dit

SHARES = (0.2, 0.25, 0.5, 0.05)
"""How often each of the four steps is trained. The third decides what is seen; the fourth adds a hundredth."""
SEQUENCES = 2
STEPS = 4000
CLIP_LATENTS, LATEST = 12, 4000
ALONE = 0.3
"""How often blocks do not see each other: the sink and the voice have to be enough."""
ASTRAY = 0.35


def noise_levels() -> list[tuple[float, float]]:
    """(timestep, share of noise) of the four steps, as the rollout's scheduler has them."""
    scheduler: Any = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    scheduler.set_timesteps(4)
    return [(float(t), float(sigma)) for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False)]


def mouth_weights(rows: int, columns: int) -> Tensor:
    """What errors weigh [rows, columns]: five times at the mouth, twice at the eyes."""
    y, x = torch.meshgrid((torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns, indexing="ij")
    mouth = ((x - 0.5).abs() < 0.13) & ((y - 0.73).abs() < 0.11)
    eyes = ((x - 0.5).abs() < 0.19) & ((y - 0.53).abs() < 0.08)
    return 1.0 + 4.0 * mouth + 1.0 * (eyes & ~mouth)


class Sample:
    """One sequence to learn from: everything in it follows from (seed, step, index)."""

    def __init__(self, example: dict[str, Any], context: Tensor, draw: np.random.Generator):
        motion, video, audio = latents.all_motion(example), example["video"].float(), example["audio"].float()
        order = [0, 1] if draw.uniform() < 0.7 else [1, 0]
        blocks, heard = video.split(BLOCK, dim=1), audio.split(4 * BLOCK, dim=-1)
        self.video = torch.cat([blocks[i] for i in order], dim=1)
        later = bool(draw.uniform() < 0.5)
        reference = motion[:, :1]
        if later:  # the first frame that was generated stands for the portrait
            at = int(draw.integers(video.shape[1]))
            reference = video[:, at : at + 1] + 0.05 * _normal(draw, motion[:, :1].shape)
        self.first_frame = BLOCK * int(
            np.exp(draw.uniform(np.log(CLIP_LATENTS / BLOCK), np.log(LATEST / BLOCK)))
            if later
            else draw.integers(CLIP_LATENTS // BLOCK)
        )
        voice = torch.cat([heard[i] for i in order], dim=-1)
        if draw.uniform() < 0.05:
            voice = voice.clone()
            voice[..., int(draw.integers(8, 24)) :] = 0  # behind a voice's end there are zeros
        self.given = Conditions(reference=reference, motion=motion, context=context, audio=voice)
        self.ring = 1 if draw.uniform() < ALONE else 4

    def astray(self, draw: np.random.Generator) -> Tensor:
        """What earlier steps may have got wrong, in units of the clean latents."""
        kind, size = draw.uniform(), ASTRAY * draw.uniform()
        if kind < 0.3:
            return torch.zeros_like(self.video)
        if kind < 0.6:  # the face of another moment
            moments = torch.from_numpy(draw.permutation(self.video.shape[1]))
            return draw.uniform() * (self.video[:, moments] - self.video)
        shape = (16, self.video.shape[1] if kind < 0.8 else 1, 1, 1) if draw.uniform() < 0.5 else self.video.shape
        return size * _normal(draw, tuple(shape)).expand_as(self.video)


def _normal(draw: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(draw.standard_normal(shape, dtype=np.float32))


def loss_of(
    dit: CausalDiT, sample: Sample, draw: np.random.Generator, weight: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """Weighted squared error of the velocity, and of the clean latents that it stands for."""
    levels = noise_levels()
    step = int(draw.choice(len(levels), p=SHARES))
    timestep, sigma = levels[step]
    noise = _normal(draw, tuple(sample.video.shape))
    noisy = sigma * noise + (1 - sigma) * (sample.video + sample.astray(draw))
    found = velocity(dit, noisy, timestep, sample.given, first_frame=sample.first_frame, ring=sample.ring)
    # In the last step noise cannot be seen any more, so the best answer knows nothing of it.
    wanted = -sample.video if sigma < 0.1 else (noisy - sample.video) / sigma
    error = (found - wanted).square()
    loss = (error * weight).mean() / weight.mean()
    facts = {"loss": loss.item()}
    if step == 2:
        off = sigma * error.detach().sqrt()
        facts |= {"clean": _size(off), "mouth": _size(off[..., weight > 4])}
    return loss, facts


def _size(error: Tensor) -> float:
    return error.square().mean().sqrt().item()


def train(
    root: Path,
    *,
    steps: int,
    count: int,
    seed: int = 0,
    peak: float = 3e-3,
    sequences: int = SEQUENCES,
    config: dict[str, Any] | None = None,
) -> CausalDiT:
    """Train in ``root/dit``, or go on there, on the first ``count`` examples of ``root/latents.pt``, ``sequences`` a
    step."""
    torch.manual_seed(seed)
    examples: list[dict[str, Any]] = torch.load(root / latents.FILE, weights_only=True)[:count]
    dit = new_dit(config)
    texts = contexts()
    optimizer = Muon(dit.parameters(), decay=0.01)
    run = Run(root, "dit", steps, {"dit": dit, "optimizer": optimizer})
    weight = mouth_weights(*examples[0]["video"].shape[2:])

    def one(step: int) -> dict[str, float]:
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps, peak)
        optimizer.zero_grad(set_to_none=True)
        told: dict[str, float] = {}
        for index in range(sequences):
            draw = np.random.default_rng([seed, step, index])
            chosen = examples[int(draw.integers(len(examples)))]
            sample = Sample(chosen, texts[int(draw.integers(len(texts)))], draw)
            loss, facts = loss_of(dit, sample, draw, weight)
            (loss / sequences).backward()
            told |= facts
        torch.nn.utils.clip_grad_norm_(dit.parameters(), 1.0)
        optimizer.step()
        return told

    run.loop(one)
    return dit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--count", type=int, default=latents.COUNT)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    train(given.out, steps=given.steps, count=given.count, seed=given.seed)


if __name__ == "__main__":
    main()
