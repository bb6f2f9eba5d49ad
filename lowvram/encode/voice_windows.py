"""A long voice encoded beside everything else: in one thread on the host, at most one window ahead of who takes it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Wav2Vec2Model

from lowvram.precision import exact_float32
from lowvram_models.long_voice import LongVoice

Tensor = torch.Tensor
Send = Callable[[int, Tensor], None]

# Where others do not take what is sent to them any more, sending ends with the process, or with theirs.
_SENDING_S = 1.0


class _Stopped(Exception):
    """Nobody wants the windows any more."""


class _SendingFailed(Exception):
    """Another rank is not there any more."""


class BackgroundPieces:
    """The windows of ``voice``, of which the first is encoded already: ``first`` are its video frames' features and its
    last feature. ``load`` gives the model for the others, on the host, and ``note`` sees each window's features.

    The thread starts when the first window is taken, or with ``send_to``, and encodes a window when the one before it
    is asked for.
    """

    def __init__(
        self,
        voice: LongVoice,
        first: tuple[Tensor, Tensor],
        load: Callable[[], Wav2Vec2Model],
        note: Callable[[Tensor], None] = lambda piece: None,
    ):
        self.voice, self._load, self._note = voice, load, note
        self.layers, self.dim = first[0].shape[1:3]
        self._ready, self._before = {0: first[0]}, first[1]
        self._to_send: Tensor | None = None
        self._asked = -1
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
        self._to_send = self._ready[0] if taken_here else self._ready.pop(0)
        self._start(0)

    def take(self, index: int) -> Tensor:
        """Features [1, layers, dim, n] of window ``index``, each once, in order; waits until it is encoded.

        Raises:
            RuntimeError: the voice is closed.
            Exception: what the thread failed with.
        """
        with self._changed:
            self._asked = index
            self._changed.notify_all()
            if self._thread is None and len(self.voice.windows) > 1:
                self._start(1)
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
