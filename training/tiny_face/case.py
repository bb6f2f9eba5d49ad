"""A portrait and a voice that a measurement makes videos of, and what is seen in them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lowvram.compare.metrics import psnr
from lowvram.media.samples import Person, Speech, synth_voice, write_wav
from lowvram.media.talking import Curve, at_frames, correlation, envelope, mouth_opening
from lowvram.pipeline import AvatarPipeline, Request
from lowvram_models.constants import FPS, SPEECH_RATE_HZ
from training.tiny_face import faces, motion

PROMPT = "A person with a hat reads a poem"
SPARSE = 7
"""One frame of so many is compared with a drawn one, which takes longer to draw than to make."""
Frames = NDArray[np.uint8]


class Case:
    """Number None is the default face and voice of ``lowvram.media.samples``."""

    def __init__(self, folder: Path, number: int | None, seconds: float):
        self.name = "default" if number is None else str(number)
        self.who = Person() if number is None else faces.person(number)
        self.voice = synth_voice(seconds, speech=Speech() if number is None else faces.speech(number))
        at_rest = faces.Expression() if number is None else faces.at_rest(number)
        self.portrait = faces.picture(self.who, at_rest)
        self.frames = math.floor(seconds * FPS)
        self.image, self.audio = folder / f"{self.name}.png", folder / f"{self.name}.wav"
        Image.fromarray(self.portrait).save(self.image)
        write_wav(self.audio, self.voice, SPEECH_RATE_HZ)
        self._curves = motion.controls(self.voice)
        self._loud = at_frames(envelope(self.voice), self.frames, FPS)

    def request(self, **more: Any) -> Request:
        size = f"{faces.SIZE}*{faces.SIZE}"
        return Request(image=self.image, audio=self.audio, prompt=PROMPT, size=size, **more)

    def video(self, pipeline: AvatarPipeline, **more: Any) -> Iterator[Frames]:
        return pipeline.stream(self.request(**more))

    def whole(self, pipeline: AvatarPipeline, **more: Any) -> Frames:
        return np.concatenate(list(self.video(pipeline, **more)))[: self.frames]

    def drawn(self, frames: range) -> Frames:
        """What the rule says that the face does."""
        shown = [motion.expressions(self._curves, frame, 1)[0] for frame in frames]
        return np.stack([faces.picture(self.who, expression) for expression in shown])

    def background(self) -> NDArray[np.bool_]:
        """[H, W]: where neither head nor shoulders ever are."""
        height, width = self.portrait.shape[:2]
        y, x = np.mgrid[:height, :width] / (height, width)[0]
        reach = (self.who.hair_width + 6 + abs(self.who.shift_x)) / 100
        return np.asarray((np.abs(x - 0.5) > reach) & (y < 0.75) | (y < 0.1))

    def background_psnr(self, frames: Frames) -> float:
        """Of frames [F, H, W, 3] against the portrait."""
        return psnr(frames, self.portrait[None], self.background())

    def loud(self, frames: range) -> Curve:
        return self._loud[frames.start : frames.stop]

    def facts(self, frames: Frames, first: int = 0) -> dict[str, float]:
        """Of frames [F, H, W, 3] from number ``first`` of the video on."""
        shown = range(first, first + len(frames))
        return {
            "mouth_with_voice": correlation(mouth_opening(frames), self.loud(shown)),
            "background_psnr": self.background_psnr(frames),
            "drawn_psnr": psnr(frames[::SPARSE], self.drawn(shown[::SPARSE])),
        }
