"""Going on when the device's memory runs out: the failed piece of work is done again on a slower layout.

Nothing that was finished is lost: a pass over the layers and the decoding of a block can be repeated, and what rings
and decoder hold moves along. What is given up, one rung at a time: first speed, by more layers streamed, rings to the
host, decoding block by block, the picture decoded in tiles. Then, only where that is allowed, quality: shorter clips, a
smaller picture, fewer steps.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from lowvram.devices import allocator_refusals, is_out_of_memory
from lowvram.media.sizes import parse_size
from lowvram.offload.placement import Placement
from lowvram_kernels.errors import DeviceError, OutOfMemoryError

T = TypeVar("T")
log = logging.getLogger(__name__)


# Of all layers, and of all rings, that one rung moves.
_SHARE = 4
MOST_TILES = 8
_BLOCK_FRAMES = 12
_LEAST_AREA_PX = 256 * 256
_SHRINK = 0.8

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """All that can change while a run goes on."""

    placement: Placement
    online_decode: bool
    vae_tiles: int = 1


def next_rung(layout: Layout, layers: int, steps: range) -> tuple[Layout, str] | None:
    """The next slower layout and what it gives up, in words; None where nothing is left."""
    return next(_rungs(layout, layers, steps), None)


def _rungs(layout: Layout, layers: int, steps: range) -> Iterator[tuple[Layout, str]]:
    placement = layout.placement
    resident = [layer for layer in range(layers) if layer not in placement.streamed_layers]
    if resident:
        streamed = tuple(sorted((*placement.streamed_layers, *_some(resident, layers))))
        yield _moved(layout, streamed_layers=streamed), f"{len(streamed)} of {layers} layers are streamed now"
    cells = [(step, layer) for layer in range(layers) for step in steps]
    on_device = [cell for cell in cells if cell not in placement.host_rings]
    if on_device:
        hosted = tuple(sorted((*placement.host_rings, *_some(on_device, len(cells)))))
        yield _moved(layout, host_rings=hosted), f"{len(hosted)} of {len(cells)} KV rings are on the host now"
    if not layout.online_decode:
        yield dataclasses.replace(layout, online_decode=True), "each block is decoded at once now"
    if layout.vae_tiles < MOST_TILES:
        tiles = layout.vae_tiles * 2
        yield dataclasses.replace(layout, vae_tiles=tiles), f"frames are decoded in {tiles} tiles now"


def _some(there: list[_T], total: int) -> list[_T]:
    """A share of the whole, spread over what is there."""
    count = min(len(there), -(-total // _SHARE))
    return [there[(2 * i + 1) * len(there) // (2 * count)] for i in range(count)]


def _moved(layout: Layout, **changes: Any) -> Layout:
    return dataclasses.replace(layout, placement=dataclasses.replace(layout.placement, **changes))


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


class Relief:
    """Holds the layout of one run and steps it down when memory runs out.

    ``events`` lists what was given up, for the run's report; ``empty_cache`` gives back what nobody holds any more.
    """

    def __init__(
        self, layout: Layout, *, layers: int, steps: range, allowed: bool, empty_cache: Callable[[], None] | None = None
    ):
        self.layout, self.events = layout, list[str]()
        self._layers, self._steps, self._allowed = layers, steps, allowed
        self._empty_cache = empty_cache or free_cached

    def attempt(self, what: str, work: Callable[[], T], give_way: Callable[[Layout], object]) -> T:
        """Do ``work``; where memory runs out, ``give_way`` to the next layout and do it again.

        Raises:
            OutOfMemoryError: nothing is left to give up, or nothing may be.
        """

        def again() -> T:
            give_way(self.layout)
            return work()

        done = self._attempted(what, work)
        while isinstance(done, RanOut):
            self._step_down(what, done.reason)
            done = self._attempted(what, again)
        return done

    def attempt_together(
        self,
        what: str,
        work: Callable[[], T],
        give_way: Callable[[Layout], object],
        *,
        keep_up: Callable[[], object],
        any_ran_out: Callable[[bool], bool],
    ) -> T:
        """``attempt`` for work in which ranks wait for each other. Where memory ran out on one of them it does its part
        of the rest without computing (``keep_up``); it alone gives way, and all do the work again.

        ``any_ran_out`` tells the other ranks whether it was here, and says whether it was anywhere.

        Raises:
            OutOfMemoryError: nothing is left to give up here, or nothing may be; the others wait for this rank then.
        """
        while True:
            done = self._attempted(what, work)
            if not isinstance(done, RanOut):
                if not any_ran_out(False):
                    return done
                continue
            self._check_allowed(what, done.reason)
            kept_up = self._attempted(what, keep_up)
            if isinstance(kept_up, RanOut):
                why = "there was no room either for what the other ranks wait for; give a smaller --vram-budget"
                raise _out_of_memory(what, kept_up.reason, why)
            any_ran_out(True)
            short: object = done
            while isinstance(short, RanOut):
                self._step_down(what, short.reason)
                short = self._attempted(what, lambda: give_way(self.layout))

    def on_host_instead(self, what: str, work: Callable[[torch.device], T], device: torch.device) -> T:
        """Do ``work`` on the device, and where it does not fit there, on the host: for what runs once a video."""
        done = self._attempted(what, lambda: work(device))
        if not isinstance(done, RanOut):
            return done
        self.went_without(what, done.reason, "it runs on the host now, which takes longer")
        return work(torch.device("cpu"))

    def went_without(self, what: str, reason: str, words: str) -> None:
        """Note what a piece of work gave up by itself.

        Raises:
            OutOfMemoryError: nothing may be given up.
        """
        self._check_allowed(what, reason)
        self._say(what, reason, words)

    def _check_allowed(self, what: str, reason: str) -> None:
        if not self._allowed:
            raise _out_of_memory(what, reason, "--no-fallback forbids to go on slower")

    def _step_down(self, what: str, reason: str) -> None:
        self._check_allowed(what, reason)
        rung = next_rung(self.layout, self._layers, self._steps)
        if rung is None:
            raise _out_of_memory(what, reason, "nothing is left that could leave the device; take a smaller --size")
        self.layout, words = rung
        self._say(what, reason, words)

    def _say(self, what: str, reason: str, words: str) -> None:
        self.events.append(f"{what}: {words}")
        log.warning("the device's memory ran out in %s (%s): %s", what, reason, words)

    def _attempted(self, what: str, work: Callable[[], T]) -> T | RanOut:
        return attempted(what, work, self._empty_cache)


@dataclasses.dataclass(frozen=True)
class RanOut:
    """Memory ran out; ``reason`` is what was said of it."""

    reason: str


def attempted(what: str, work: Callable[[], T], empty_cache: Callable[[], None]) -> T | RanOut:
    """Do ``work``, and where the device's memory runs out, give back what it took.

    Raises:
        DeviceError: memory ran out, and the device does not answer any more.
    """
    before = allocator_refusals()
    try:
        return work()
    except RuntimeError as error:
        if not is_out_of_memory(error, refused=allocator_refusals() > before):
            raise
        ran_out = RanOut(first_sentences(error))
    # Outside the handler: what failed is not held by its traceback any more.
    try:
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        empty_cache()
    except RuntimeError as error:
        raise DeviceError(
            f"the device's memory ran out in {what} ({ran_out.reason}), and it does not answer since "
            f"({first_sentences(error)}): nothing on it can be used by this process any more; start again with a "
            "smaller --vram-budget, what was written before is kept"
        ) from error
    return ran_out


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
