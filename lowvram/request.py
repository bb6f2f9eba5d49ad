"""What to make, and the files of it read: cheap, so that bad input is told before any model loads."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch

from lowvram.media.audio import SPEECH_RATE_HZ, check_duration, load_speech
from lowvram.media.image import load_portrait, portrait_tensor
from lowvram.media.sizes import output_size
from lowvram.schedule import FRAMES_PER_BLOCK, VIDEO_FRAMES_PER_LATENT, latent_frames_per_clip
from lowvram_kernels.errors import ConfigError

Tensor = torch.Tensor

FPS = 25
PIXELS_PER_LATENT = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to make. ``size`` names an area "A*B"; the portrait decides the shape. Validated at construction.

    ``num_clip`` None means as many clips of ``infer_frames`` video frames as the audio fills, and what its last frames
    need of one more.
    ``online_decode`` False decodes a clip at a time instead of a block at a time.
    """

    image: Path
    audio: Path
    prompt: str
    size: str = "704*384"
    infer_frames: int = 48
    num_clip: int | None = None
    sample_steps: int = 4
    base_seed: int = 420
    cond_rope_distance: int | str = 30
    online_decode: bool = True

    def __post_init__(self) -> None:
        latent_frames_per_clip(self.infer_frames)
        if self.num_clip is not None and self.num_clip < 1:
            raise ConfigError(f"--num_clip is {self.num_clip}; expected 1 or more, or none for the whole audio")
        if not 1 <= self.sample_steps <= 1000:
            raise ConfigError(f"--sample_steps is {self.sample_steps}; expected 1 to 1000, 4 is what the model is for")
        if not 0 <= self.base_seed < 2**63 - 2**32:
            raise ConfigError(f"--base_seed is {self.base_seed}; expected a whole number from 0 to about 9e18")
        distance = self.cond_rope_distance
        if distance != "random" and not (isinstance(distance, int) and 0 <= distance <= 30):
            raise ConfigError(f"--cond-rope-distance is {distance!r}; expected 0 to 30, or random")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """A request's files, read: portrait [3, H, W] in [-1, 1] and speech, mono float32 at 16 kHz."""

    request: Request
    portrait: Tensor
    speech: np.ndarray

    @property
    def latent_size(self) -> tuple[int, int]:
        height, width = self.portrait.shape[1:]
        return height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT

    @property
    def voice_frames(self) -> int:
        """Video frames that begin before the voice ends."""
        return -(-len(self.speech) * FPS // SPEECH_RATE_HZ)


def read_inputs(request: Request) -> Inputs:
    """Read and check portrait and voice; cheap, so that bad input is told before any model loads.

    Raises:
        InputError: a file is missing, is not what it should be, or is too small, large, short or silent.
    """
    speech = load_speech(request.audio)
    check_duration(speech, FRAMES_PER_BLOCK * VIDEO_FRAMES_PER_LATENT, FPS)
    image = load_portrait(request.image)
    height, width = output_size(request.size, image.height, image.width)
    return Inputs(request=request, portrait=portrait_tensor(image, height, width), speech=speech)
