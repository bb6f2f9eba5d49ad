"""Workload: what is to be made, as the counts of tokens that all costs follow from; model-spec sections 3 and 4."""

from __future__ import annotations

import dataclasses

import torch

from lowvram.media.sizes import parse_size
from lowvram.schedule import FRAMES_PER_BLOCK, latent_frames_per_clip
from lowvram_kernels.errors import ConfigError
from lowvram_kernels.rounding import round_up
from lowvram_models.constants import PIXELS_PER_LATENT

PIXELS_PER_TOKEN = 16
_COMPUTED_IN = (torch.bfloat16, torch.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """``latent_size`` is (h, w) of the latents, ``infer_frames`` video frames a clip, ``dtype`` what everything that is
    not 8-bit is computed in on the device. Validated at construction.

    The number of clips changes no byte and no second a block: rings, cache and workspace are those of one clip. Nor
    does the length of the voice, but that of a long one is encoded window by window, on the host: ``voice_on_host``.
    """

    latent_size: tuple[int, int]
    infer_frames: int = 48
    sample_steps: int = 4
    voice_on_host: bool = False
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        latent_frames_per_clip(self.infer_frames)
        if min(self.latent_size) < 8:
            raise ConfigError(f"latents of {self.latent_size} are too small; expected 8 x 8 (64 x 64 px) or more")
        if not 1 <= self.sample_steps <= 1000:
            raise ConfigError(f"--sample_steps is {self.sample_steps}; expected 1 to 1000, 4 is what the model is for")
        if self.dtype not in _COMPUTED_IN:
            raise ConfigError(f"{self.dtype} was to be computed in; expected torch.bfloat16 or torch.float32")

    @classmethod
    def of_size(
        cls, size: str, *, infer_frames: int = 48, sample_steps: int = 4, dtype: torch.dtype = torch.bfloat16
    ) -> Workload:
        """The workload of a size "A*B" without a portrait.

        A portrait's aspect turns an area into multiples of 64 px that stay *within* it. Without one, the area's own
        height and width are taken, rounded up to whole tokens (16 px) only: that is never less than any portrait
        can make of it, and keeps sizes apart, as 720*400, that multiples of 64 would merge with smaller ones.

        Raises:
            InputError: not a size.
        """
        height, width = sorted(parse_size(size))
        latent_size = (_latents(height), _latents(width))
        return cls(latent_size=latent_size, infer_frames=infer_frames, sample_steps=sample_steps, dtype=dtype)

    def at_size(self, size: str) -> Workload:
        """The same at another size; see ``of_size``."""
        latent_size = Workload.of_size(size).latent_size
        return dataclasses.replace(self, latent_size=latent_size)

    @property
    def value_bytes(self) -> int:
        """Bytes of a value that is not 8-bit."""
        return self.dtype.itemsize

    @property
    def dtype_name(self) -> str:
        """As ``--dtype`` has it."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def size_px(self) -> tuple[int, int]:
        """Height and width of the frames."""
        return self.latent_size[0] * PIXELS_PER_LATENT, self.latent_size[1] * PIXELS_PER_LATENT

    @property
    def pixels(self) -> int:
        return self.size_px[0] * self.size_px[1]

    @property
    def tokens_per_frame(self) -> int:
        return (self.latent_size[0] // 2) * (self.latent_size[1] // 2)

    @property
    def frames_per_clip(self) -> int:
        """Latent frames."""
        return latent_frames_per_clip(self.infer_frames)

    @property
    def frames_per_block(self) -> int:
        """Latent frames of a clip's longest block."""
        return min(FRAMES_PER_BLOCK, self.frames_per_clip)

    @property
    def blocks_per_clip(self) -> int:
        """Blocks, and so slots of a ring."""
        return -(-self.frames_per_clip // self.frames_per_block)

    @property
    def block_tokens(self) -> int:
        return self.frames_per_block * self.tokens_per_frame

    @property
    def ring_tokens(self) -> int:
        """Tokens that a ring holds: one clip."""
        return self.frames_per_clip * self.tokens_per_frame

    @property
    def sink_tokens(self) -> int:
        """Reference frame, last motion frame, and the motion frames before it packed 2x and 4x."""
        height, width = self.latent_size
        packed = (height // 4) * (width // 4) + 4 * (height // 8) * (width // 8)
        return 2 * self.tokens_per_frame + packed


def _latents(length_px: int) -> int:
    return round_up(length_px, PIXELS_PER_TOKEN) // PIXELS_PER_LATENT
