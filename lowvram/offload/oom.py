"""Fallback when the device's memory runs out: the failed piece of work is done again, a rung further down the ladder.

Nothing that was finished is lost: a pass over the layers and the decoding of a block can be repeated, and what rings
and decoder hold moves along. What is given up, one rung at a time: first speed, by more layers streamed, rings to the
host, decoding block by block, the picture decoded in tiles. Then, only where that is allowed, quality: shorter clips, a
smaller picture, fewer steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, TypeVar

import torch

from lowvram.devices import allocator_refusals, is_out_of_memory
from lowvram.media.sizes import parse_size
from lowvram.offload.placement import Placement
from lowvram_kernels.errors import DeviceError, OutOfMemoryError

log = logging.getLogger(__name__)


# Of all layers, and of all rings, that one rung moves.
_SHARE = 4
MOST_TILES = 8
_BLOCK_FRAMES = 12
_LEAST_AREA_PX = 256 * 256
_SHRINK = 0.8

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rung:
    """Where a run stands on the ladder: all that can change while it goes on."""

    placement: Placement
    online_decode: bool
    vae_tiles: int = 1


def next_rung(rung: Rung, layers: int, steps: range) -> tuple[Rung, str] | None:
    """The next lower rung and what it gives up, in words; None where nothing is left."""
    return next(_rungs(rung, layers, steps), None)


def _rungs(rung: Rung, layers: int, steps: range) -> Iterator[tuple[Rung, str]]:
    placement = rung.placement
    resident = [layer for layer in range(layers) if layer not in placement.streamed_layers]
    if resident:
        streamed = tuple(sorted((*placement.streamed_layers, *_some(resident, layers))))
        yield _moved(rung, streamed_layers=streamed), f"{len(streamed)} of {layers} layers are streamed now"
    cells = [(step, layer) for layer in range(layers) for step in steps]
    on_device = [cell for cell in cells if cell not in placement.host_rings]
    if on_device:
        hosted = tuple(sorted((*placement.host_rings, *_some(on_device, len(cells)))))
        yield _moved(rung, host_rings=hosted), f"{len(hosted)} of {len(cells)} KV rings are on the host now"
    if not rung.online_decode:
        yield dataclasses.replace(rung, online_decode=True), "each block is decoded at once now"
    if rung.vae_tiles < MOST_TILES:
        tiles = rung.vae_tiles * 2
        yield dataclasses.replace(rung, vae_tiles=tiles), f"frames are decoded in {tiles} tiles now"


def _some(there: list[_T], total: int) -> list[_T]:
    """A share of the whole, spread over what is there."""
    count = min(len(there), -(-total // _SHARE))
    return [there[(2 * i + 1) * len(there) // (2 * count)] for i in range(count)]


def _moved(rung: Rung, **changes: Any) -> Rung:
    return dataclasses.replace(rung, placement=dataclasses.replace(rung.placement, **changes))


def smaller_request(size: str, infer_frames: int, sample_steps: int) -> tuple[dict[str, Any], str] | None:
    """What of a request to change next where quality may be lost, and that in words; None at the end."""
    if infer_frames > _BLOCK_FRAMES:
        frames = max(_BLOCK_FRAMES, infer_frames // 2 // _BLOCK_FRAMES * _BLOCK_FRAMES)
        return {"infer_frames": frames}, f"clips of {frames} frames instead of {infer_frames}"
    sides = parse_size(size)
    if sides[0] * sides[1] > _LEAST_AREA_PX:
        a, b = (max(64, int(side * _SHRINK) // 16 * 16) for side in sides)
        return {"size": f"{a}*{b}"}, f"size {a}*{b} instead of {size}"
    if sample_steps > 1:
        return {"sample_steps": sample_steps - 1}, f"{sample_steps - 1} steps instead of {sample_steps}"
    return None


class Attempt(contextlib.AbstractContextManager["Attempt"]):
    """One try of a piece of work: entered around it. Where the device's memory runs out in it, ``reason`` is what was
    said of that, and the program goes on behind it."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def __enter__(self) -> Attempt:
        self._refused = allocator_refusals()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        ran_out = isinstance(error, RuntimeError) and is_out_of_memory(
            error, refused=allocator_refusals() > self._refused
        )
        if ran_out and error is not None:
            self.reason = first_sentences(error)
        return ran_out


class Ladder:
    """Steps of one run down to less of the device's memory; ``rung`` is where it stands.

    ``events`` lists what was given up, for the run's report; ``empty_cache`` gives back what nobody holds any more.

    A piece of work stands in a loop over its attempts, in one call: what it made so far is then held by nobody when
    its next attempt begins.

        for attempt in ladder.attempts("decode", degrade):
            with attempt:
                frames = decode(block)
    """

    def __init__(
        self, rung: Rung, *, layers: int, steps: range, allowed: bool, empty_cache: Callable[[], None] | None = None
    ):
        self.rung, self.events = rung, list[str]()
        self._layers, self._steps, self._allowed = layers, steps, allowed
        self._empty_cache = empty_cache or free_cached

    def attempts(self, what: str, degrade: Callable[[Rung], object] | None = None) -> Iterator[Attempt]:
        """Attempts until one succeeds. Before every further one a rung is given up, and ``degrade`` moves what is there
        already; none is needed where the work builds everything anew.

        Raises:
            OutOfMemoryError: nothing is left to give up, or nothing may be.
            DeviceError: the device does not answer any more.
        """
        yield (attempt := Attempt())
        while attempt.reason is not None:
            self._recover(what, attempt.reason)
            self._step_down(what, attempt.reason)
            attempt = Attempt()
            if degrade is not None:
                with attempt:
                    degrade(self.rung)
            if attempt.reason is None:
                yield attempt

    def attempts_together(
        self,
        what: str,
        degrade: Callable[[Rung], object],
        *,
        keep_up: Callable[[], object],
        any_ran_out: Callable[[bool], bool],
    ) -> Iterator[Attempt]:
        """``attempts`` at work in which ranks wait for each other. Where memory ran out on one of them it does its part
        of the rest without computing (``keep_up``); it alone degrades, and all do the work again.

        ``any_ran_out`` tells the other ranks whether it was here, and says whether it was anywhere.

        Raises:
            OutOfMemoryError: nothing is left to give up here, or nothing may be; the others wait for this rank then.
            DeviceError: the device does not answer any more.
        """
        again = True
        while again:
            yield (attempt := Attempt())
            if attempt.reason is None:
                again = any_ran_out(False)
                continue
            self._recover(what, attempt.reason)
            self._check_allowed(what, attempt.reason)
            with (keeping_up := Attempt()):
                keep_up()
            if keeping_up.reason is not None:
                why = "there was no room either for what the other ranks wait for; give a smaller --vram-budget"
                raise _out_of_memory(what, keeping_up.reason, why)
            any_ran_out(True)
            while attempt.reason is not None:
                self._step_down(what, attempt.reason)
                with (attempt := Attempt()):
                    degrade(self.rung)
                if attempt.reason is not None:
                    self._recover(what, attempt.reason)

    def devices(
        self, what: str, device: torch.device
    ) -> Iterator[tuple[torch.device, contextlib.AbstractContextManager[object]]]:
        """Attempts on the device, and where the work does not fit there, on the host: for what runs once a video.

        Raises:
            OutOfMemoryError: the device's memory ran out, and nothing may be given up.
            DeviceError: the device does not answer any more.
        """
        yield device, (attempt := Attempt())
        if attempt.reason is not None:
            self._recover(what, attempt.reason)
            self.went_without(what, attempt.reason, "it runs on the host now, which takes longer")
            yield torch.device("cpu"), contextlib.nullcontext()

    def went_without(self, what: str, reason: str, words: str) -> None:
        """Note what a piece of work gave up by itself.

        Raises:
            OutOfMemoryError: nothing may be given up.
        """
        self._check_allowed(what, reason)
        self._say(what, reason, words)

    def let_go(self, what: str, reason: str, words: str) -> None:
        """Note what was given up that nobody had asked for."""
        self.events.append(f"{what}: {words}")
        log.warning("%s is given up (%s): %s", what, reason, words)

    def _check_allowed(self, what: str, reason: str) -> None:
        if not self._allowed:
            raise _out_of_memory(what, reason, "--no-fallback forbids to go on slower")

    def _step_down(self, what: str, reason: str) -> None:
        self._check_allowed(what, reason)
        found = next_rung(self.rung, self._layers, self._steps)
        if found is None:
            raise _out_of_memory(what, reason, "nothing is left that could leave the device; take a smaller --size")
        self.rung, words = found
        self._say(what, reason, words)

    def _say(self, what: str, reason: str, words: str) -> None:
        self.events.append(f"{what}: {words}")
        log.warning("the device's memory ran out in %s (%s): %s", what, reason, words)

    def _recover(self, what: str, reason: str) -> None:
        """Give back what a failed attempt took.

        Raises:
            DeviceError: the device does not answer any more.
        """
        try:
            if torch.cuda.is_available() and torch.cuda.is_initialized():
                torch.cuda.synchronize()
            self._empty_cache()
        except RuntimeError as error:
            raise DeviceError(
                f"the device's memory ran out in {what} ({reason}), and it does not answer since "
                f"({first_sentences(error)}): nothing on it can be used by this process any more; start again with a "
                "smaller --vram-budget, what was written before is kept"
            ) from error


def free_cached() -> None:
    """Give back what nobody holds any more, of all GPUs."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _out_of_memory(what: str, reason: str, advice: str) -> OutOfMemoryError:
    return OutOfMemoryError(f"the device's memory ran out in {what}: {reason}; {advice}")


_HINTS = (
    " If reserved but unallocated",
    " Search for `cuda",
    " CUDA kernel errors might be",
    " For debugging consider",
)


def first_sentences(error: BaseException) -> str:
    """What torch says of bytes wanted, there and free; not its hints behind that."""
    text = " ".join(str(error).split())
    for hint in _HINTS:
        text = text.split(hint, 1)[0]
    return text.rstrip(".")
