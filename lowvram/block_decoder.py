"""The VAE's part of a run: blocks of latents to pixels in order, with relief where memory runs out.

Shapes: C latent channels, F frames, h x w latent size, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from lowvram.decoder_backup import DecoderBackup
from lowvram.loading.encoders import load_vae
from lowvram.offload.oom_ladder import Layout
from lowvram.runtime import Runtime
from lowvram.schedule import Block
from lowvram_models.vae import DROPPED_FIRST_FRAMES, PRIMING_LATENTS, StreamingDecoder

Tensor = torch.Tensor


class BlockDecoder:
    """Primed with the motion latents [C, 19, h, w]. ``give_way`` moves what else is on the device."""

    def __init__(self, runtime: Runtime, motion_CFhw: Tensor, give_way: Callable[[Layout], None]):
        self._runtime, self._give_way = runtime, give_way
        self._decoder = runtime.relief.attempt("decode", lambda: self._start(motion_CFhw), give_way)
        self._backup = DecoderBackup(runtime.engine, self._decoder)
        self._save()

    def _start(self, motion_CFhw: Tensor) -> StreamingDecoder:
        runtime = self._runtime
        with runtime.stages.stage("decode"):
            found = load_vae(runtime.artifact, runtime.device, runtime.dtype).start_decoder()
            found.strips = runtime.layout.vae_tiles
            found.prime(motion_CFhw[:, :PRIMING_LATENTS])
            return found

    def decode(self, block: Block, latent_CFhw: Tensor) -> tuple[Tensor, np.ndarray]:
        """A block's frames, [3, F, H, W] in [-1, 1], and the same as uint8 [F, H, W, 3]."""

        def decode() -> tuple[Tensor, np.ndarray]:
            with self._runtime.traced("decode"):
                dropped = DROPPED_FIRST_FRAMES if block.index == 0 else 0
                # Another rank's latents arrive on the host.
                frames = self._decoder.decode(latent_CFhw.to(self._runtime.device))[:, dropped:]
                return frames, to_pixels(frames)

        self._backup.before_decoding()
        decoded = self._runtime.relief.attempt("decode", decode, self._again)
        self._save()
        return decoded

    def _again(self, layout: Layout) -> None:
        self._give_way(layout)
        self._decoder.strips = layout.vae_tiles
        self._backup.restore()

    def _save(self) -> None:
        if self._runtime.memory.fallback:
            self._backup.save()


def to_pixels(frames_CFHW: Tensor) -> np.ndarray:
    """[3, F, H, W] in [-1, 1] -> uint8 [F, H, W, 3]."""
    scaled = frames_CFHW.float().clamp(-1, 1).add(1).mul(127.5).round()
    pixels: np.ndarray = scaled.to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu().numpy()
    return pixels
