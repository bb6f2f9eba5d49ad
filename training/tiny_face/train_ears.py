"""Train the audio encoder to hear what a face does: ``python -m training.tiny_face.train_ears --out FOLDER``.

Only what comes before its 24 layers learns: convolutions, projection and positional convolution give the curves of
``motion.controls``, delayed by ``motion.DELAY_S``, as linear functions of the first hidden state. The layers pass it on
almost as it is, so that a mean over all of them says the same.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import Wav2Vec2ForCTC

from lowvram.media.samples import synth_voice
from lowvram_quantize.synthetic_encoders import wav2vec2_model
from training.tiny_face import faces, motion
from training.tiny_face.optim import Muon, rate
from training.tiny_face.run import Run

WIDTH = 24
CHANGES = {"num_conv_pos_embeddings": 64, "intermediate_size": WIDTH, "conv_dim": (24,) * 7}
FEATURE_HZ, FIRST_FEATURE_S = 50, 0.0125
QUIET_LAYERS = 0.03
SECONDS = 4.0
STEPS = 1500
POOL = 200
_SCALE = torch.tensor([1.0, 4.0, 1.0, 1.0])[:, None]
"""Widths differ by a quarter only."""


class Ears(nn.Module):
    """wav2vec2 as published, and what reads curves from its first hidden state in training."""

    def __init__(self) -> None:
        super().__init__()
        self.model = wav2vec2_model(WIDTH, **CHANGES)
        self.read = nn.Linear(WIDTH, len(motion.NAMES))
        with torch.no_grad():
            for layer in self.model.wav2vec2.encoder.layers:
                layer.attention.out_proj.weight.mul_(QUIET_LAYERS)
                layer.feed_forward.output_dense.weight.mul_(QUIET_LAYERS)

    def forward(self, wave_BN: Tensor) -> Tensor:
        """Normalised samples -> curves [B, 4, features] as in ``targets``."""
        model = self.model.wav2vec2
        features = model.feature_extractor(wave_BN).transpose(1, 2)
        hidden, _ = model.feature_projection(features)
        return self.read(hidden + model.encoder.pos_conv_embed(hidden)).transpose(1, 2)

    def learning(self) -> list[nn.Parameter]:
        model = self.model.wav2vec2
        parts = (model.feature_extractor, model.feature_projection, model.encoder.pos_conv_embed, self.read)
        return [parameter for part in parts for parameter in part.parameters()]


def sound(number: int, seconds: float = SECONDS) -> NDArray[np.float32]:
    """A voice, or noise that swells as one; with a hiss, and silent at the beginning or the end, at times."""
    draw = np.random.default_rng([number, 31])
    samples = synth_voice(seconds, speech=faces.speech(number))
    if draw.uniform() < 0.25:
        loud = np.sqrt(np.convolve(np.square(samples), np.hanning(801) / 400, mode="same"))
        noise = np.convolve(draw.standard_normal(len(samples)), np.hanning(int(draw.integers(3, 40))), mode="same")
        samples = (loud * noise / noise.std()).astype(np.float32)
    if draw.uniform() < 0.3:
        cut = int(draw.integers(len(samples) // 2))
        samples[slice(cut) if draw.uniform() < 0.5 else slice(len(samples) - cut, None)] = 0.0
    hiss = samples.std() * 10 ** draw.uniform(-3, -1.3)
    return (samples + hiss * draw.standard_normal(len(samples))).astype(np.float32)


def normalised(samples: NDArray[np.float32]) -> Tensor:
    """As transformers' feature extractor does it."""
    return torch.from_numpy((samples - samples.mean()) / np.sqrt(samples.var() + 1e-7))


def targets(samples: NDArray[np.float32], features: int) -> Tensor:
    """[4, features]: the curves at the features' times, delayed."""
    curves = motion.controls(samples)
    time_s = np.arange(features) / FEATURE_HZ + FIRST_FEATURE_S - motion.DELAY_S
    at = np.clip(np.round(time_s * motion.STEP_HZ).astype(int), 0, curves.shape[1] - 1)
    return torch.from_numpy(curves[:, at]).float()


def train(root: Path, *, steps: int, seed: int = 0, batch: int = 4, seconds: float = SECONDS) -> Ears:
    """Train in ``root/ears``, or go on there."""
    torch.manual_seed(seed)
    ears = Ears()
    optimizer = Muon(ears.learning())
    run = Run(root, "ears", steps, {"ears": ears, "optimizer": optimizer})
    pool: list[tuple[Tensor, NDArray[np.float32]]] = []

    def one(step: int) -> dict[str, float]:
        samples = sound(seed * 100_000 + step, seconds)
        pool.append((normalised(samples), samples))
        del pool[:-POOL]
        picks = np.random.default_rng([seed, step, 2]).integers(len(pool), size=batch - 1)
        chosen = [pool[-1], *(pool[pick] for pick in picks)]
        found = ears(torch.stack([wave for wave, _ in chosen]))
        wanted = torch.stack([targets(samples, found.shape[-1]) for _, samples in chosen])
        error = ((found - wanted) * _SCALE).square().mean(dim=(0, 2))
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps, 4e-3)
        optimizer.zero_grad(set_to_none=True)
        error.sum().backward()
        optimizer.step()
        return {"loss": error.sum().item()} | dict(zip(motion.NAMES, error.sqrt().tolist(), strict=True))

    run.loop(one)
    return ears


def published(ears: Ears) -> Wav2Vec2ForCTC:
    return ears.model.eval()


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
