"""Going on when the device's memory runs out: the failed piece of work is done again on a slower layout.

Nothing that was finished is lost: a pass over the layers and the decoding of a block can be repeated, and what rings
and decoder hold moves along.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from lowvram.fallback import Layout, next_rung
from lowvram.simulate import simulated_device
from lowvram_kernels.errors import OutOfMemoryError

log = logging.getLogger(__name__)
T = TypeVar("T")


class Relief:
    """Holds the layout of one run and steps it down when memory runs out.

    ``events`` lists what was given up, for the run's report.
    """

    def __init__(self, layout: Layout, *, layers: int, steps: range, allowed: bool):
        self.layout, self.events = layout, list[str]()
        self._layers, self._steps, self._allowed = layers, steps, allowed

    def attempt(self, what: str, work: Callable[[], T], give_way: Callable[[Layout], object]) -> T:
        """Do ``work``; where memory runs out, ``give_way`` to the next layout and do it again.

        Raises:
            OutOfMemoryError: nothing is left to give up, or nothing may be.
        """
        changed = False
        while True:
            try:
                if changed:
                    give_way(self.layout)
                return work()
            except torch.cuda.OutOfMemoryError as error:
                reason = first_sentences(error)
            # Outside the handler: what failed is not held by its traceback any more.
            free_cached()
            self._step_down(what, reason)
            changed = True

    def once(self, what: str, work: Callable[[], T], why: str) -> T:
        """Do ``work``, which cannot be done again; ``why``, and what to do, is said where memory runs out.

        Raises:
            OutOfMemoryError: it did.
        """
        try:
            return work()
        except torch.cuda.OutOfMemoryError as error:
            raise _out_of_memory(what, first_sentences(error), why) from error

    def on_host_instead(self, what: str, work: Callable[[torch.device], T], device: torch.device) -> T:
        """Do ``work`` on the device, and where it does not fit there, on the host: for what runs once a video."""
        try:
            return work(device)
        except torch.cuda.OutOfMemoryError as error:
            reason = first_sentences(error)
        free_cached()
        self.went_without(what, reason, "it runs on the host now, which takes longer")
        return work(torch.device("cpu"))

    def went_without(self, what: str, reason: str, words: str) -> None:
        """Note what a piece of work gave up by itself.

        Raises:
            OutOfMemoryError: nothing may be given up.
        """
        if not self._allowed:
            raise _out_of_memory(what, reason, "--no-fallback forbids to go on slower")
        self._say(what, reason, words)

    def _step_down(self, what: str, reason: str) -> None:
        if not self._allowed:
            raise _out_of_memory(what, reason, "--no-fallback forbids to go on slower")
        rung = next_rung(self.layout, self._layers, self._steps)
        if rung is None:
            raise _out_of_memory(what, reason, "nothing is left that could leave the device; take a smaller --size")
        self.layout, words = rung
        self._say(what, reason, words)

    def _say(self, what: str, reason: str, words: str) -> None:
        self.events.append(f"{what}: {words}")
        log.warning("the device's memory ran out in %s (%s): %s", what, reason, words)


def free_cached() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if (simulated := simulated_device()) is not None:
        simulated.empty_cache()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _out_of_memory(what: str, reason: str, advice: str) -> OutOfMemoryError:
    return OutOfMemoryError(f"the device's memory ran out in {what}: {reason}; {advice}")


def first_sentences(error: BaseException) -> str:
    """What torch says of bytes wanted, there and free; not its hints behind that."""
    text = " ".join(str(error).split())
    return text.split(" If reserved but unallocated", 1)[0].rstrip(".")
