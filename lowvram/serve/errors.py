"""Refusals of the API: a reason, and the HTTP status that goes with it."""

from __future__ import annotations

from lowvram_kernels.errors import LowvramError


class Refused(LowvramError):
    """A request that is not met; ``status`` is HTTP's, 400 to 599."""

    exit_code = 2

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


class Stopped(LowvramError):
    """A job under way was told to end: it was cancelled, or the process ends."""
