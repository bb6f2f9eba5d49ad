"""A tiny model for every test that needs one, made once a run."""

from __future__ import annotations

import dataclasses
import gc
import os
from pathlib import Path

# One thread, unless somebody said how many: tests run in several processes, which only disturb each other, and start
# more, which find it in the environment. Said before torch is imported, so that it holds for every thread of pipelines.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from lowvram.media.samples import draw_portrait, synth_voice, write_wav
from lowvram.pipeline import Request
from lowvram_kernels import choices
from lowvram_quantize.convert import convert
from lowvram_quantize.synthetic import write_checkpoint


@dataclasses.dataclass(frozen=True)
class Tiny:
    """Folders of a tiny checkpoint and its artifacts, a portrait and a second of voice."""

    root: Path

    @property
    def checkpoint(self) -> Path:
        return self.root / "ckpt"

    @property
    def lora(self) -> Path:
        return self.checkpoint / "LiveAvatar" / "liveavatar.safetensors"

    @property
    def portrait(self) -> Path:
        return self.root / "portrait.png"

    @property
    def voice(self) -> Path:
        return self.root / "voice.wav"

    def artifact(self, precision: str) -> Path:
        path = self.root / precision
        if not path.exists():
            convert(self.checkpoint, path, precision=precision, lora=self.lora, lora_alpha=2.0)
        return path

    def request(self, **changes) -> Request:
        """Two clips of one and a half blocks each, at the smallest size."""
        settings = {"size": "128*128", "infer_frames": 16, "num_clip": 2, "sample_steps": 2}
        files = {"image": self.portrait, "audio": self.voice}
        return Request(**files | {"prompt": "A person speaks"} | settings | changes)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    """With a VAE of the narrowest kind: it takes most of a tiny video's time."""
    return _written(tmp_path_factory.mktemp("tiny"), vae_base_dim=2)


@pytest.fixture(scope="session")
def wide(tmp_path_factory) -> Tiny:
    """With a wider VAE: for tests of what it makes of latents."""
    return _written(tmp_path_factory.mktemp("wide"))


def _written(root: Path, **widths: int) -> Tiny:
    write_checkpoint(root / "ckpt", **widths)
    draw_portrait(128, 128).save(root / "portrait.png")
    write_wav(root / "voice.wav", synth_voice(1.5), 16000)
    return Tiny(root)


def pytest_collection_finish() -> None:
    """Thousands of tests are known by now, and stay: a collection of garbage behind a video need not look at them."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: begun last, one of them would keep one worker while the other has nothing."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def kernels_as_they_were():
    """What a test switches off or prefers is set back behind it."""
    with choices.restored():
        yield
