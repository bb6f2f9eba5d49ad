"""``meta`` in the place of a GPU: dispatchers choose what they would choose there, and launches are only told of."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from lowvram_kernels import chips, choices


@contextlib.contextmanager
def meta_as(generation: int) -> Iterator[None]:
    """Let ``meta`` stand for a CUDA device of this compute capability (8.9 is 89) in the whole process.

    Choices for other devices are what they were. What was switched off or preferred on a card is not so here. Not to be
    entered by two threads at a time.
    """
    before = chips.stand_for(generation)
    choices.forget_choices()
    try:
        yield
    finally:
        chips.stand_for(before)
        choices.forget_choices()
