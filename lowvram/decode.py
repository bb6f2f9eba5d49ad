"""Decoder: the VAE's part of a run, blocks of latents to pixels in order, again on less where memory runs out.

The decoder's cache as it was after the last finished block is kept, so that a block whose decoding failed can be
decoded again. It lies on the host: a second copy on the device would take as much as the cache itself.
Shapes: C latent channels, F frames, h x w latent size, H x W pixels.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from lowvram.loading.encoders import load_decoder, load_vae
from lowvram.offload.copy_engine import Engine
from lowvram.offload.events import DONE, Moment
from lowvram.offload.oom import Rung
from lowvram.runtime import Run
from lowvram.schedule import Block
from lowvram_models.constants import DROPPED_FIRST_FRAMES, PRIMING_LATENTS

if TYPE_CHECKING:
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

    def let_go(self) -> list[Tensor]:
        """Forget what is kept; the host's memory of it, which nothing copies to any more."""
        self.before_decoding()
        self._engine.settle()
        there, self._slots = self._slots, []
        return [_bytes_of(slot) for slot in there if isinstance(slot, Tensor)] if self._engine.apart else []

    def before_decoding(self) -> None:
        """Let the decoder wait until its cache has been copied: it is about to be replaced."""
        _wait_for_copies(self._engine, self._done)

    def restore(self) -> None:
        """Give the decoder its cache of the last ``save`` back; comes behind ``before_decoding``."""
        state = self._decoder.state
        # First let go of the half-done one.
        self._decoder.state = dataclasses.replace(state, slots=[None] * len(self._slots))
        slots = [self._back(slot) if isinstance(slot, Tensor) else slot for slot in self._slots]
        self._decoder.state = dataclasses.replace(self._decoder.state, slots=slots, num_latents=self._num_latents)

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


def _restored(fresh: DecoderState, kept: Mapping[str, Tensor], device: torch.device) -> DecoderState:
    slots: list[Tensor | str | None] = [None] * len(fresh.slots)
    for name, tensor in kept.items():
        index, _, kind = name.partition(".")
        if kind:
            there = tensor.to(device)
            word = kind.removeprefix("word.")
            slots[int(index)] = {"plain": there, "last": there.movedim(-1, 1)}.get(kind, word)
    return dataclasses.replace(fresh, slots=slots, num_latents=int(kept["latents"]))


def _bytes_of(slot: Tensor) -> Tensor:
    return slot.view(-1).view(torch.uint8)


def _wait_for_copies(engine: Engine, moments: list[Moment]) -> None:
    """Let what is computed from here on wait for the copies out of the cache."""
    for moment in moments:
        engine.wait(moment)


class BlockDecoder:
    """Primed with the motion latents [C, 19, h, w], or gone on with from a ``state``. ``degrade`` moves what else is on
    the device, if any."""

    def __init__(
        self,
        run: Run,
        motion_CFhw: Tensor,
        degrade: Callable[[Rung], None] | None,
        state: Mapping[str, Tensor] | None = None,
    ):
        self._run, self._runtime, self._degrade_others, self._state = run, run.runtime, degrade, state
        for attempt in run.ladder.attempts("decode", degrade):
            with attempt:
                self._decoder = self._start(motion_CFhw)
        self._backup = DecoderBackup(run.runtime.engine, self._decoder)
        self._save()

    def _start(self, motion_CFhw: Tensor) -> StreamingDecoder:
        runtime = self._runtime
        with runtime.stages.stage("decode"):
            load = load_decoder if self._run.rung.placement.wide_vae else load_vae
            found = load(runtime.artifact, runtime.device, runtime.dtype).start_decoder()
            found.strips = self._run.rung.vae_tiles
            if self._state is None:
                found.prime(motion_CFhw[:, :PRIMING_LATENTS])
            else:
                found.state = _restored(found.state, self._state, runtime.device)
            return found

    def state(self) -> dict[str, Tensor]:
        """The decoder's cache as it is now, to go on from: how many latents it has seen, and each slot under its number
        and how it lies. What a slot says in place of a tensor stands in its name."""
        state = self._decoder.state
        kept = {"latents": torch.tensor(state.num_latents)}
        for index, slot in enumerate(state.slots):
            if isinstance(slot, str):
                kept[f"{index}.word.{slot}"] = torch.empty(0)
            elif slot is not None and slot.is_contiguous():
                kept[f"{index}.plain"] = slot
            elif slot is not None:  # channels last
                kept[f"{index}.last"] = slot.movedim(1, -1).contiguous()
        return kept

    def decode(self, block: Block, latent_CFhw: Tensor) -> tuple[Tensor, np.ndarray]:
        """A block's frames, [3, F, H, W] in [-1, 1], and the same as uint8 [F, H, W, 3]."""
        self._backup.before_decoding()
        for attempt in self._run.ladder.attempts("decode", self._degrade):
            with attempt:
                decoded = self._decode(block, latent_CFhw)
        self._save()
        return decoded

    def end(self) -> None:
        """No more blocks come: host memory of the cache goes to the next video, where there may be one."""
        if self._runtime.kept is not None:
            self._runtime.engine.spare(self._backup.let_go())

    def _decode(self, block: Block, latent_CFhw: Tensor) -> tuple[Tensor, np.ndarray]:
        with self._runtime.traced("decode"):
            dropped = DROPPED_FIRST_FRAMES if block.index == 0 else 0
            # Another rank's latents arrive on the host.
            frames = self._decoder.decode(latent_CFhw.to(self._runtime.device))[:, dropped:]
            return frames, to_pixels(frames)

    def _degrade(self, rung: Rung) -> None:
        if self._degrade_others is not None:
            self._degrade_others(rung)
        self._decoder.strips = rung.vae_tiles
        self._backup.restore()

    def _save(self) -> None:
        if self._runtime.memory.fallback:
            self._backup.save()


def to_pixels(frames_CFHW: Tensor) -> np.ndarray:
    """[3, F, H, W] in [-1, 1] -> uint8 [F, H, W, 3]."""
    scaled = frames_CFHW.float().clamp(-1, 1).add(1).mul(127.5).round()
    pixels: np.ndarray = scaled.to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu().numpy()
    return pixels
