"""Worker processes that are ranks of one run after another, and what they make."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lowvram.media.video import read_frames
from lowvram_quantize.convert import convert
from lowvram_quantize.synthetic import write_checkpoint
from tests.lowvram.parallel.ranks import Ended, Ranks

# Four blocks, of 3 and 1 latent frames, 64 tokens in each: three ranks have 22, 21 and 21 of them.
SETTINGS = {"size": "128*128", "infer_frames": 16, "num_clip": 2, "sample_steps": 4, "device": "cpu"}


@pytest.fixture(scope="session")
def ranks():
    found = Ranks()
    yield found
    found.close()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
    """What a run left: the dumped tensors, the frames of its video, its report, and how its ranks ended."""

    tensors: dict[str, torch.Tensor]
    video: np.ndarray
    report: dict[str, Any]
    ended: list[Ended]

    @property
    def latents(self) -> list[torch.Tensor]:
        """Block by block."""
        count = sum(name.startswith("latents.") for name in self.tensors)
        return [self.tensors[f"latents.block{index}"] for index in range(count)]


@dataclasses.dataclass(frozen=True)
class Maker:
    """Makes videos of one tiny model, by as many ranks as are asked for. Its VAE is narrow: one rank has all of it, so
    what it takes says nothing here."""

    root: Path
    portrait: Path
    voice: Path
    ranks: Ranks

    def artifact(self, precision: str = "fp32") -> Path:
        path, checkpoint = self.root / precision, self.root / "ckpt"
        if not checkpoint.exists():
            write_checkpoint(checkpoint, vae_base_dim=2)
        if not path.exists():
            convert(checkpoint, path, precision=precision)
        return path

    def arguments(self, out: Path, *more: str, precision: str = "fp32", **changes: Any) -> list[str]:
        """Of ``infer``."""
        files = {"model": self.artifact(precision), "image": self.portrait, "audio": self.voice, "out": out}
        options = files | {"prompt": "A peer speaks"} | SETTINGS | changes
        return ["infer", "-q", *(f"--{name}={value}" for name, value in options.items()), *more]

    def make(self, out: Path, world: int, *more: str, options: Mapping[str, Any] | None = None, **changes: Any) -> Made:
        """``more`` and ``changes`` are options of the command line, ``options`` are those of ``Ranks.run``; 0 ranks are
        one process."""
        video, dump, report = out / "out.mp4", out / "out.safetensors", out / "out.json"
        files = (f"--dump-tensors={dump}", f"--report={report}", "--overwrite")
        arguments = self.arguments(video, *files, *more, **changes)
        ended = self.ranks.succeed(world, arguments, **(options or {}))
        return Made(
            tensors=load_file(dump),
            video=np.stack(list(read_frames(video))).astype(int),
            report=json.loads(report.read_text()),
            ended=ended,
        )


@pytest.fixture(scope="session")
def maker(ranks, tiny, tmp_path_factory) -> Maker:
    return Maker(tmp_path_factory.mktemp("ranks"), tiny.portrait, tiny.voice, ranks)


def layout_options(stages: int, ulysses: int, vae: bool) -> Sequence[str]:
    return [f"--num_gpus_dit={stages * ulysses}", f"--ulysses_size={ulysses}", f"--enable_vae_parallel={vae}"]
