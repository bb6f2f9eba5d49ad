"""The video decoder's cache as it was after the last finished block, so that a block whose decoding failed can be
decoded again. It lies on the host: a second copy on the device would take as much as the cache itself."""

from __future__ import annotations

import weakref

import torch

from lowvram.offload.copy_engine import Engine
from lowvram.offload.events import DONE, Moment
from lowvram_models.vae import DecoderState, StreamingDecoder

Tensor = torch.Tensor


class DecoderBackup:
    """Copies go out beside the computation, while the next block is denoised."""

    def __init__(self, engine: Engine, decoder: StreamingDecoder):
        self._engine, self._decoder = engine, decoder
        self._slots: list[Tensor | str | None] = []
        self._num_latents = 0
        self._done: list[Moment] = [DONE]
        # The cache goes back to where computations get their memory from.
        weakref.finalize(self, _wait_for_copies, engine, self._done).atexit = False

    def save(self) -> None:
        """Keep the decoder's cache as it is now."""
        state = self._decoder.state
        old, self._slots = self._slots or [None] * len(state.slots), []
        for slot, before in zip(state.slots, old, strict=True):
            self._slots.append(self._kept(slot, before) if isinstance(slot, Tensor) else slot)
        self._num_latents = state.num_latents

    def before_decoding(self) -> None:
        """Let the decoder wait until its cache has been copied: it is about to be replaced."""
        _wait_for_copies(self._engine, self._done)

    def restore(self) -> None:
        """Give the decoder its cache of the last ``save`` back; comes behind ``before_decoding``."""
        self._decoder.state = DecoderState(slots=[None] * len(self._slots))  # first let go of the half-done one
        slots = [self._back(slot) if isinstance(slot, Tensor) else slot for slot in self._slots]
        self._decoder.state = DecoderState(slots=slots, num_latents=self._num_latents)

    def _kept(self, slot: Tensor, before: Tensor | str | None) -> Tensor:
        if not self._engine.apart:
            return slot  # the network replaces slots and never writes to them
        if isinstance(before, Tensor) and before.shape == slot.shape:
            host = before
        else:
            host = self._engine.host_buffer(slot.nbytes).view(slot.dtype).view(slot.shape)
        self._done[:] = [self._engine.copy_out(host, slot, self._engine.now())]  # those before come before it
        return host

    def _back(self, kept: Tensor) -> Tensor:
        if not self._engine.apart:
            return kept
        slot = torch.empty(kept.shape, dtype=kept.dtype, device=self._engine.device)
        self._engine.wait(self._engine.copy_in(slot, kept, self._engine.now()))
        return slot


def _wait_for_copies(engine: Engine, moments: list[Moment]) -> None:
    """Let what is computed from here on wait for the copies out of the cache."""
    for moment in moments:
        engine.wait(moment)
