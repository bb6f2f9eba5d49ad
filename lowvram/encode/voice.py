"""Voice as the DiT hears it: audio features of video frames, whole of a short one, window by window of a long one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

Tensor = torch.Tensor


class Voice(Protocol):
    """Features of ``num_frames`` video frames, zeros behind the end of the voice."""

    @property
    def num_frames(self) -> int: ...

    @property
    def failure(self) -> BaseException | None:
        """What went wrong in the background."""
        ...

    def frames(self, first: int, count: int) -> Tensor:
        """[1, layers, dim, count] of the video frames from ``first`` on; may wait for them."""
        ...

    def close(self) -> None:
        """Leave nothing running; safe to call twice."""
        ...


class WholeVoice:
    """Features [1, layers, dim, N] of N video frames."""

    failure: BaseException | None = None

    def __init__(self, features: Tensor):
        self.features = features

    @property
    def num_frames(self) -> int:
        return int(self.features.shape[-1])

    def frames(self, first: int, count: int) -> Tensor:
        return self.features[..., first : first + count]

    def close(self) -> None:
        """There is nothing to close."""


class Pieces(Protocol):
    """Features of one window's video frames after the other's."""

    @property
    def failure(self) -> BaseException | None: ...

    def take(self, index: int) -> Tensor:
        """[1, layers, dim, n] of window ``index``: each is taken once, in order."""
        ...

    def close(self) -> None: ...


class VoiceInWindows:
    """A long voice; ``ends`` says behind which video frame each window ends. Frames are asked for in order, and may
    overlap with what was asked for last: no more than the windows of these frames are held."""

    def __init__(self, ends: Sequence[int], pieces: Pieces):
        self.ends, self.pieces = list(ends), pieces
        self._held: list[tuple[int, Tensor]] = []
        self._next = 0

    @property
    def num_frames(self) -> int:
        return self.ends[-1]

    @property
    def failure(self) -> BaseException | None:
        return self.pieces.failure

    def frames(self, first: int, count: int) -> Tensor:
        """Raises: ValueError for frames that are let go already, or that never come."""
        if count < 1 or first + count > self.num_frames or first < self._begin():
            raise ValueError(
                f"video frames {first} to {first + count} were asked for; expected some of {self._begin()} to "
                f"{self.num_frames}"
            )
        while self._next < len(self.ends) and (self._next == 0 or self.ends[self._next - 1] < first + count):
            # What is not needed any more goes before the next one comes.
            self._held = [(start, piece) for start, piece in self._held if start + piece.shape[-1] > first]
            start = self.ends[self._next - 1] if self._next else 0
            self._held.append((start, self.pieces.take(self._next)))
            self._next += 1
        parts = [piece[..., max(0, first - start) : max(0, first + count - start)] for start, piece in self._held]
        return torch.cat(parts, dim=-1)

    def _begin(self) -> int:
        return self._held[0][0] if self._held else 0

    def close(self) -> None:
        self._held.clear()
        self.pieces.close()


@contextlib.contextmanager
def listening(voice: Voice) -> Iterator[None]:
    """Close the voice behind what is done with it; where that fails for what went wrong in the background, raise the
    latter."""
    try:
        yield
    except Exception as error:
        voice.close()
        if voice.failure is not None and voice.failure is not error:
            raise voice.failure from error
        raise
    finally:
        voice.close()
