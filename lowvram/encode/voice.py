"""Voice as the DiT hears it: audio features of video frames, whole of a short one, window by window of a long one.

A long voice is encoded beside everything else: in one thread on the host, at most one window ahead of who takes it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from lowvram.precision import exact_float32
from lowvram_models.long_voice import LongVoice

if TYPE_CHECKING:
    from transformers import Wav2Vec2Model

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
    """Features [people, layers, dim, N] of N video frames."""

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
    """A long voice; ``ends`` says behind which video frame each window ends, and ``index`` which window comes first.
    Frames are asked for in order, and may overlap with what was asked for last: no more than the windows of these
    frames are held."""

    def __init__(self, ends: Sequence[int], pieces: Pieces, index: int = 0):
        self.ends, self.pieces = list(ends), pieces
        self._held: list[tuple[int, Tensor]] = []
        self._next, self._first = index, self.ends[index - 1] if index else 0

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
        return self._held[0][0] if self._held else self._first

    def close(self) -> None:
        self._held.clear()
        self.pieces.close()


class SeveralVoices:
    """Voices of several people at once, of which at least one is long."""

    def __init__(self, voices: Sequence[Voice]):
        self.voices = list(voices)

    @property
    def num_frames(self) -> int:
        return min(voice.num_frames for voice in self.voices)

    @property
    def failure(self) -> BaseException | None:
        return next((voice.failure for voice in self.voices if voice.failure is not None), None)

    def frames(self, first: int, count: int) -> Tensor:
        """[people, layers, dim, count]."""
        return torch.cat([voice.frames(first, count) for voice in self.voices])

    def close(self) -> None:
        for voice in self.voices:
            voice.close()


def together(voices: Sequence[Voice]) -> Voice:
    """One voice, or those of several people as one."""
    whole = [voice for voice in voices if isinstance(voice, WholeVoice)]
    if len(voices) == 1:
        return voices[0]
    if len(whole) < len(voices):
        return SeveralVoices(voices)
    frames = min(voice.num_frames for voice in whole)
    return WholeVoice(torch.cat([voice.features[..., :frames] for voice in whole]))


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


Send = Callable[[int, Tensor], None]

# Where others do not take what is sent to them any more, sending ends with the process, or with theirs.
_SENDING_S = 1.0


class _Stopped(Exception):
    """Nobody wants the windows any more."""


class _SendingFailed(Exception):
    """Another rank is not there any more."""


class BackgroundPieces:
    """The windows of ``voice`` from ``index`` on, of which the first is encoded already: ``first`` are its video
    frames' features and its last feature. ``load`` gives the model for the others, on the host, and ``note`` sees each
    window's features.

    The thread starts when the first window is taken, or with ``send_to``, and encodes a window when the one before it
    is asked for.
    """

    def __init__(
        self,
        voice: LongVoice,
        first: tuple[Tensor, Tensor],
        load: Callable[[], Wav2Vec2Model],
        note: Callable[[Tensor], None] = lambda piece: None,
        index: int = 0,
    ):
        self.voice, self._load, self._note = voice, load, note
        self.layers, self.dim = first[0].shape[1:3]
        self._first, self._ready, self._before = index, {index: first[0]}, first[1]
        self._to_send: Tensor | None = None
        self._asked = index - 1
        self._stopped = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._send: Send | None = None
        self._failed: Callable[[BaseException], None] = lambda error: None
        self._taken_here = True
        self.failure: BaseException | None = None
        note(first[0])

    def send_to(self, send: Send, failed: Callable[[BaseException], None], *, taken_here: bool) -> None:
        """Also ``send`` every window, which returns when all others have taken it; ``taken_here`` says whether somebody
        here takes it too. ``failed`` hears, in the thread, what this rank fails with."""
        self._send, self._failed, self._taken_here = send, failed, taken_here
        self._to_send = self._ready[self._first] if taken_here else self._ready.pop(self._first)
        self._start(self._first)

    def take(self, index: int) -> Tensor:
        """Features [1, layers, dim, n] of window ``index``, each once, in order; waits until it is encoded.

        Raises:
            RuntimeError: the voice is closed.
            Exception: what the thread failed with.
        """
        with self._changed:
            self._asked = index
            self._changed.notify_all()
            if self._thread is None and len(self.voice.windows) > self._first + 1:
                self._start(self._first + 1)
            self._changed.wait_for(lambda: index in self._ready or self._stopped or self.failure is not None)
            if self.failure is not None:
                raise self.failure
            if self._stopped:
                raise RuntimeError("the voice is closed; expected nobody to ask for more of it")
            return self._ready.pop(index)

    def close(self) -> None:
        """End the thread, also in the middle of a window."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(None if self._send is None else _SENDING_S)
        self._ready.clear()

    def _start(self, index: int) -> None:
        threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, args=(index, threads), name="lowvram-voice", daemon=True)
        self._thread.start()

    def _run(self, index: int, threads: int) -> None:
        try:
            torch.set_num_threads(threads)  # every thread has a number of its own
            with torch.inference_mode(), exact_float32():
                self._each(index)
        except _Stopped:
            pass
        except BaseException as error:  # whatever it is, it is raised where the windows are waited for
            cause = error.__cause__ if isinstance(error, _SendingFailed) else None
            with self._changed:
                self.failure = cause or error
                self._changed.notify_all()
            if cause is None:
                self._failed(error)

    def _each(self, begin: int) -> None:
        model = None
        for index in range(begin, len(self.voice.windows)):
            self._wait_for_turn(index)
            piece, self._to_send = self._to_send, None
            if piece is None:
                model = model or self._interruptible(self._load())
                piece, self._before = self.voice.encode(model, self.voice.windows[index], self._before)
                self._note(piece)
                self._hand_over(index, piece)
            self._pass_on(index, piece)

    def _hand_over(self, index: int, piece: Tensor) -> None:
        if self._taken_here:
            with self._changed:
                self._ready[index] = piece
                self._changed.notify_all()

    def _pass_on(self, index: int, piece: Tensor) -> None:
        if self._send is not None:
            try:
                self._send(index, piece)
            except RuntimeError as error:
                raise _SendingFailed from error

    def _wait_for_turn(self, index: int) -> None:
        with self._changed:
            if self._taken_here:
                self._changed.wait_for(lambda: self._asked >= index - 1 or self._stopped)
            self._check()

    def _check(self) -> None:
        if self._stopped:
            raise _Stopped

    def _interruptible(self, model: Wav2Vec2Model) -> Wav2Vec2Model:
        def check(layer: nn.Module, arguments: Any) -> None:
            self._check()

        for layer in model.encoder.layers:
            layer.register_forward_pre_hook(check)
        return model
