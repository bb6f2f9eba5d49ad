"""What stays of a video for the next one of the same process: weights where they are, and prompts that were encoded."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections import OrderedDict

import torch

from lowvram.loading.encoders import AUDIO_WEIGHTS
from lowvram.offload.layers import Layers
from lowvram_models.dit import CausalDiT
from lowvram_models.names import START
from lowvram_quantize.format import Artifact

Tensor = torch.Tensor

PROMPTS = 32
"""So many of them are remembered: 4 MiB each of the 14B."""


def give_back_freed() -> None:
    """Let the system have the host memory that is free within this process: what one video leaves between what stays
    would lie there until the next. glibc's; elsewhere nothing happens."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class Kept:
    """Nothing at first. Layers of the DiT stay on the device, or in pinned host memory, as ``layers`` has them; what
    every video loads anew for a moment stays in host memory: the VAE, the audio encoder, and what a rollout is set up
    with. The text encoder, 7 GB of the 14B, does not: it is loaded again for a prompt that is not among the last ones.
    """

    def __init__(self) -> None:
        self.model: tuple[CausalDiT, Layers] | None = None
        self._prompts: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()

    def prompt(self, text: str) -> tuple[Tensor, Tensor] | None:
        """Token ids and context of a prompt, if it is known."""
        if text in self._prompts:
            self._prompts.move_to_end(text)
        return self._prompts.get(text)

    def remember(self, text: str, ids: Tensor, context: Tensor) -> None:
        """Know a prompt's token ids and context from now on, and forget the one that was not used for longest."""
        self._prompts[text] = (ids.cpu(), context.cpu())
        while len(self._prompts) > PROMPTS:
            self._prompts.popitem(last=False)

    def hold(self, artifact: Artifact, *, apart: bool) -> None:
        """Have at hand what every video loads; ``apart``: the device's memory is other memory than the host's."""
        for slab in artifact.component("vae").slab_names:
            artifact.component("vae").hold(slab, copied=apart)
        artifact.component("dit").hold(START, copied=apart)
        artifact.hold_tensors(AUDIO_WEIGHTS)

    def let_go(self) -> None:
        """Of the weights on the device; prompts, and what lies on the host, stay."""
        self.model = None
