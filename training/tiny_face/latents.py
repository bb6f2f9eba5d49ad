"""What the DiT learns from: people in latents, and what is heard of their voices. Made once, kept in one file.

``python -m training.tiny_face.latents --out FOLDER`` needs the trained audio encoder there. Of the VAE it
needs the encoder only, which is made anew.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Wav2Vec2Model

from lowvram_models.audio_encoder import audio_embedding, extract_features
from lowvram_models.constants import MOTION_LATENTS, SPEECH_RATE_HZ
from training.tiny_face import faces, motion, train_ears, train_vae
from training.tiny_face.train_ears import Ears
from training.tiny_face.vae import TrainableVAE

STILL, LEAD = 9, 4
"""Frames of the portrait in front, which the encoder's cache settles on, and of speech before those that are kept."""
FRAMES = 24
CLIP = 48
COUNT = 600
FILE = "latents.pt"
SAVE_EVERY = 20


def load_vae(root: Path) -> TrainableVAE:
    """The trained VAE, its latents on the published mean and deviation."""
    vae = TrainableVAE()
    vae.load_state_dict(_part(root / "vae", "vae"))
    vae.activate(8)
    vae.requires_grad_(False)
    return published_scale(vae)


def load_ears(root: Path) -> Ears:
    ears = Ears().eval().requires_grad_(False)
    ears.load_state_dict(_part(root / "ears", "ears"))
    return ears


def _part(folder: Path, name: str) -> dict[str, Tensor]:
    parts: dict[str, dict[str, Tensor]] = torch.load(folder / "state.pt", weights_only=True)["parts"]
    return parts[name]


def published_scale(vae: TrainableVAE) -> TrainableVAE:
    """``TrainableVAE.normalise``: the encoder was made for latents of mean 0 and deviation 1."""
    vae.normalise(torch.zeros(16), torch.ones(16))
    return vae


def statistics(vae: TrainableVAE) -> tuple[Tensor, Tensor]:
    """Mean and deviation [16, 1, 1, 1] of the published latents."""
    config = vae.vae.config
    mean, std = torch.tensor(config.latents_mean), torch.tensor(config.latents_std)
    return mean.view(-1, 1, 1, 1), std.view(-1, 1, 1, 1)


@torch.no_grad()
def example(vae: TrainableVAE, model: Wav2Vec2Model, number: int, size: int = faces.SIZE) -> dict[str, Any]:
    """``motion`` [16, 4, h, w], of which the last is what all later ones are and the first the reference; ``video``
    [16, 6, h, w], two blocks of speech; ``audio`` [1, layers, width, 24], heard at those frames. Half precision."""
    draw = np.random.default_rng([number, 41])
    samples = train_ears.sound(number)
    room = int(len(samples) / SPEECH_RATE_HZ * motion.FPS) - FRAMES
    first = 0 if draw.uniform() < 0.25 else int(draw.integers(room))
    curves = motion.controls(samples)
    shown = [faces.at_rest(number)] * STILL
    # What is decoded as frame d is shown three frames earlier.
    shown += motion.expressions(curves, first - LEAD - 3, LEAD + FRAMES)
    who = faces.person(number)
    clip = torch.from_numpy(np.stack([faces.picture(who, expression, size) for expression in shown]))
    clip = clip.permute(3, 0, 1, 2).float() / 127.5 - 1
    mean, std = statistics(vae)
    latents = (vae.encode(clip[None])[0] - mean) / std
    still, lead = 1 + (STILL - 1) // 4, LEAD // 4
    features = audio_embedding(extract_features(model, samples), CLIP)[..., first : first + FRAMES]
    return {
        "number": number,
        "first": first,
        "motion": latents[:, :still].half(),
        "video": latents[:, still + lead :].half(),
        "audio": features.half(),
    }


def all_motion(example: dict[str, Any]) -> Tensor:
    """[16, 19, h, w] float32."""
    known: Tensor = example["motion"].float()
    return torch.cat([known, known[:, -1:].expand(-1, MOTION_LATENTS - known.shape[1], -1, -1)], dim=1)


def make(root: Path, count: int, *, seed: int = 1, size: int = faces.SIZE) -> list[dict[str, Any]]:
    """``count`` examples, from ``root/latents.pt`` as far as they are there."""
    file = root / FILE
    examples: list[dict[str, Any]] = torch.load(file, weights_only=True) if file.is_file() else []
    vae, model = published_scale(train_vae.new_vae(size).requires_grad_(False)), load_ears(root).model.wav2vec2
    vae.activate(0)
    while len(examples) < count:
        examples.append(example(vae, model, seed * 100_000 + len(examples), size))
        if len(examples) % SAVE_EVERY == 0 or len(examples) == count:
            torch.save(examples, file.with_suffix(".partial"))
            os.replace(file.with_suffix(".partial"), file)
            print(f"{len(examples)} of {count}", flush=True)
    return examples[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    make(given.out, given.count)


if __name__ == "__main__":
    main()
