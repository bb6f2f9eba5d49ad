"""Limits of what a client may ask."""

from __future__ import annotations

import dataclasses

from lowvram_kernels.errors import ConfigError

MIB = 2**20
MAX_INFER_FRAMES = 240
"""Of a clip, whose rings grow with it: on a processor no plan refuses what does not fit."""
MAX_PROMPT = 4000
"""Characters; the model reads 512 tokens."""
FIELD_BYTES = 64 * 1024
"""Of all fields of a form that are no files, together."""
BODY_BYTES = MIB
"""Of a request that is no upload."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """``queue`` jobs wait at the most; ``upload_bytes`` is of each file of a job; ``seconds`` of video a job.
    ``idle_s`` without a byte, or ``upload_s`` in all, end an upload. ``listeners`` follow events and videos at once.
    Validated at construction.
    """

    queue: int = 20
    upload_bytes: int = 200 * MIB
    seconds: float = 600.0
    idle_s: float = 30.0
    upload_s: float = 900.0
    listeners: int = 64

    def __post_init__(self) -> None:
        if not 1 <= self.queue <= 10_000:
            raise ConfigError(f"--max-queue is {self.queue}; expected 1 to 10000 jobs")
        if self.upload_bytes < 1:
            raise ConfigError(f"--max-upload is {self.upload_bytes} bytes; expected 1 or more, as 200MiB")
        if not self.seconds > 0:
            raise ConfigError(f"--max-seconds is {self.seconds:g}; expected more than 0")
