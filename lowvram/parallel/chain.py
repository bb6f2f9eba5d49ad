"""Where blocks come from and go to: the denoising steps before and behind those that run here.

Shapes: C latent channels, F latent frames, h x w latent size.
"""

from __future__ import annotations

from typing import Protocol

import torch

from lowvram.schedule import Block

Tensor = torch.Tensor
LATENT_CHANNELS = 16


class Chain(Protocol):
    def take(self, block: Block) -> Tensor | None:
        """A block's latent [C, F, h, w] from the steps before; None where its first step is to run here."""
        ...

    def pass_on(self, block: Block, latent_CFhw: Tensor) -> None:
        """A block has taken its last step here."""
        ...

    def reference(self) -> Tensor:
        """The first latent frame [C, 1, h, w] of the video, once it has taken all steps."""
        ...


class Alone:
    """All steps run here."""

    def __init__(self) -> None:
        self._reference: Tensor | None = None

    def take(self, block: Block) -> Tensor | None:
        return None

    def pass_on(self, block: Block, latent_CFhw: Tensor) -> None:
        if block.index == 0:
            self._reference = latent_CFhw[:, :1]

    def reference(self) -> Tensor:
        if self._reference is None:
            raise RuntimeError("the first block is not finished; expected it to be before the second clip starts")
        return self._reference
