"""All of the training, one part after the other: ``python -m training.tiny_face.everything --out FOLDER``.

Cut at any point it goes on there when it is run again. A part that has its steps is not run again: to train it longer,
give it more steps, and take away the folders of what comes after it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from training.tiny_face import export, latents, train_dit, train_ears, train_vae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--to", type=Path, default=export.HERE, help="where the package's files go")
    parser.add_argument("--ears-steps", type=int, default=train_ears.STEPS)
    parser.add_argument("--vae-steps", type=int, default=train_vae.STEPS)
    parser.add_argument("--people", type=int, default=latents.COUNT)
    parser.add_argument("--dit-steps", type=int, default=train_dit.STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    train_ears.train(given.out, steps=given.ears_steps, seed=given.seed)
    latents.make(given.out, given.people)
    train_vae.train(given.out, steps=given.vae_steps, seed=given.seed)
    train_dit.train(given.out, steps=given.dit_steps, count=given.people, seed=given.seed)
    export.from_folder(given.out, given.to)


if __name__ == "__main__":
    main()
