"""A long voice on its way from the rank that encodes it to those that denoise, window by window.

Each window goes to each rank by itself. A broadcast would let ranks hand on what they receive: the first stage would
wait for the second one, which hears of a block from the first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch

from lowvram.encode.voice import BackgroundPieces, VoiceInWindows, WholeVoice
from lowvram.parallel.comm import Comm

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class VoiceExtent:
    """What ranks have to know of a voice beforehand: the ``layers`` and ``dim`` of its features, and behind which video
    frame each of its windows ends; a short voice has one window."""

    layers: int
    dim: int
    ends: list[int]

    @classmethod
    def of(cls, voice: Any) -> VoiceExtent:
        """Of a voice that is encoded here."""
        if isinstance(voice, WholeVoice):
            layers, dim, frames = voice.features.shape[1:]
            return cls(layers=layers, dim=dim, ends=[frames])
        if isinstance(voice, VoiceInWindows) and isinstance(voice.pieces, BackgroundPieces):
            return cls(layers=voice.pieces.layers, dim=voice.pieces.dim, ends=voice.ends)
        raise TypeError(f"{type(voice).__name__} cannot be sent; expected a voice that is encoded here")

    def frames(self, index: int) -> int:
        """Video frames of a window."""
        return self.ends[index] - (self.ends[index - 1] if index else 0)

    def empty(self, index: int) -> tuple[int, int, int, int]:
        """Shape of a window's features."""
        return 1, self.layers, self.dim, self.frames(index)


def send_windows(
    voice: VoiceInWindows, comm: Comm, others: Iterable[int], failed: Callable[[BaseException], None], taken_here: bool
) -> None:
    """Let the thread that encodes ``voice`` send each window to ``others``, one window ahead of the last of them."""
    ranks = list(others)

    def send(index: int, piece: Tensor) -> None:
        for rank in ranks:
            comm.send(piece, rank, index)
        comm.settle()

    if not isinstance(voice.pieces, BackgroundPieces):
        raise TypeError(f"{type(voice.pieces).__name__} has no thread; expected a voice that is encoded here")
    voice.pieces.send_to(send, failed, taken_here=taken_here)


class SentPieces:
    """Windows as they come from rank ``sender``."""

    failure: BaseException | None = None

    def __init__(
        self, facts: VoiceExtent, comm: Comm, sender: int, waiting: Callable[[str], AbstractContextManager[None]]
    ):
        self._facts, self._comm, self._sender, self._waiting = facts, comm, sender, waiting

    def take(self, index: int) -> Tensor:
        with self._waiting("the voice"):
            return self._comm.expect(self._facts.empty(index), self._sender, index).wait()

    def close(self) -> None:
        """What nobody takes any more ends with the run."""
