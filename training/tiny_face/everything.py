"""All of the training, one part after the other: ``python -m training.tiny_face.everything --out FOLDER``.

Cut at any point it goes on there when it is run again. A part that has its steps is not run again: to train it longer,
give it more steps, and take away the folders of what comes after it.

``--test-size`` is a tenth of the steps on small pictures with a small DiT, a minute of one core: whether everything
runs and every loss falls, not a model to be used.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

from training.tiny_face import export, faces, latents, train_dit, train_ears, train_vae
from training.tiny_face.shapes import SETTINGS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Steps of the three trainings, ``people`` whose latents the DiT learns, sides of their pictures in px, what the
    VAE sees a step, seconds and number of the voices a step, and the DiT's sequences a step and settings."""

    ears_steps: int = train_ears.STEPS
    vae_steps: int = train_vae.STEPS
    dit_steps: int = train_dit.STEPS
    people: int = latents.COUNT
    picture_px: int = faces.SIZE
    crops: train_vae.Crops = train_vae.CROPS
    voices: int = 4
    voice_s: float = train_ears.SECONDS
    sequences: int = train_dit.SEQUENCES
    settings: dict[str, Any] = dataclasses.field(default_factory=lambda: dict(SETTINGS))


TEST_SIZE = Sizes(
    ears_steps=60,
    vae_steps=240,
    dit_steps=164,
    people=4,
    picture_px=64,
    crops=train_vae.Crops(count=1, frames=5, sides=(32,)),
    voices=2,
    voice_s=1.0,
    sequences=1,
    settings=SETTINGS | {"dim": 32, "ffn_dim": 48, "num_heads": 2, "num_layers": 2, "audio_inject_layers": [0]},
)
"""A tenth of the steps that the package's weights took."""


def train(root: Path, to: Path, sizes: Sizes, *, seed: int = 0) -> None:
    """Everything, in ``root``, or what is left of it there; the package's files and the log go to ``to``."""
    train_ears.train(root, steps=sizes.ears_steps, seed=seed, batch=sizes.voices, seconds=sizes.voice_s)
    latents.make(root, sizes.people, size=sizes.picture_px)
    train_vae.train(root, steps=sizes.vae_steps, seed=seed, size=sizes.picture_px, crops=sizes.crops)
    train_dit.train(
        root, steps=sizes.dit_steps, count=sizes.people, seed=seed, sequences=sizes.sequences, config=sizes.settings
    )
    export.from_folder(root, to, sizes.settings)


def falls(root: Path) -> dict[str, tuple[float, float]]:
    """Of each training in ``root`` the loss of its first step and the mean of those logged last."""
    found = {}
    for name in export.TRAININGS:
        lines = [json.loads(line) for line in (root / name / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        found[name] = lines[0]["loss"], lines[-1]["loss"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--to", type=Path, help="where the package's files go; default: into the package")
    parser.add_argument("--ears-steps", type=int, default=train_ears.STEPS)
    parser.add_argument("--vae-steps", type=int, default=train_vae.STEPS)
    parser.add_argument("--people", type=int, default=latents.COUNT)
    parser.add_argument("--dit-steps", type=int, default=train_dit.STEPS)
    parser.add_argument("--test-size", action="store_true", help="small, into --out, with numbers of its own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    names = ("ears_steps", "vae_steps", "dit_steps", "people")
    changed = [f"--{name.replace('_', '-')}" for name in names if getattr(given, name) != parser.get_default(name)]
    if given.test_size and changed:
        parser.error(f"{', '.join(changed)}: --test-size has numbers of its own; expected one of both")
    torch.set_num_threads(given.threads)
    if not given.test_size:
        sizes = Sizes(**{name: getattr(given, name) for name in names})
        train(given.out, given.to or export.HERE, sizes, seed=given.seed)
        return
    train(given.out, given.to or given.out / "weights", TEST_SIZE, seed=given.seed)
    losses = falls(given.out)
    for name, (first, last) in losses.items():
        print(f"{name}: loss from {first:.4g} to {last:.4g}")
    if risen := [name for name, (first, last) in losses.items() if not last < first]:
        sys.exit(f"the loss did not fall: {', '.join(risen)}")


if __name__ == "__main__":
    main()
