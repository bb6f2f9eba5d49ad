"""The video decoder's cache as it was after the last finished block, so that a block whose decoding failed can be
decoded again. It lies on the host: a second copy on the device would take as much as the cache itself."""

from __future__ import annotations

import torch

from lowvram.engine import DONE, Engine, Moment
from lowvram_models.vae import DecoderState, StreamingDecoder

Tensor = torch.Tensor


class DecoderBackup:
    """Copies go out beside the computation, while the next block is denoised."""

    def __init__(self, engine: Engine, decoder: StreamingDecoder):
        self._engine, self._decoder = engine, decoder
        self._slots: list[Tensor | str | None] = []
        self._num_latents = 0
        self._done: Moment = DONE

    def save(self) -> None:
        """Keep the decoder's cache as it is now."""
        state = self._decoder.state
        old, self._slots = self._slots or [None] * len(state.slots), []
        for slot, before in zip(state.slots, old, strict=True):
            self._slots.append(self._kept(slot, before) if isinstance(slot, Tensor) else slot)
        self._num_latents = state.num_latents

    def before_decoding(self) -> None:
        """Let the decoder wait until its cache has been copied: it is about to be replaced."""
        self._engine.wait(self._done)

    def restore(self) -> None:
        """Give the decoder its cache of the last ``save`` back."""
        self._decoder.state = DecoderState(slots=[None] * len(self._slots))  # first let go of the half-done one
        self._engine.settle()
        device = self._engine.device
        slots = [slot.to(device) if isinstance(slot, Tensor) else slot for slot in self._slots]
        self._decoder.state = DecoderState(slots=slots, num_latents=self._num_latents)

    def _kept(self, slot: Tensor, before: Tensor | str | None) -> Tensor:
        if slot.device.type == "cpu":
            return slot  # the network replaces slots and never writes to them
        if isinstance(before, Tensor) and before.shape == slot.shape:
            host = before
        else:
            host = self._engine.host_buffer(slot.nbytes).view(slot.dtype).view(slot.shape)
        self._done = self._engine.copy_out(host, slot, self._engine.now())
        return host
