"""Points in a device's work, which copies and computations wait for."""

from __future__ import annotations


class Moment:
    """A point in the device's work. This one has passed already."""


DONE = Moment()


class Mark(Moment):
    """A point of one stream."""

    def pass_on_host(self) -> None:
        """Let the host wait for it."""
