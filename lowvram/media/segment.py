"""Segments of a longer take: what one says of itself in its file, and which of the take's sound stands in it.

Sound is encoded in AAC frames of ``AAC_SAMPLES``, counted from the take's begin whatever segment they stand in: frame
q is heard from sample q * ``AAC_SAMPLES`` on, frame -1 is the encoder's delay. A frame is right only behind the one
before it, so that a segment's file also has the frame before the first that is heard.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from lowvram_kernels.errors import ConfigError

AAC_SAMPLES = 1024
KEY = "lowvram_segment"
"""Under which a file's metadata has the facts, as JSON."""
_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """Where a file stands in a take: ``take`` is what all its segments are called and no other's, as a checksum of all
    that goes into it; ``first_frame`` is how many frames of it stand in the segments before.

    Raises:
        ConfigError: an empty name, a negative frame.
    """

    take: str
    first_frame: int = 0

    def __post_init__(self) -> None:
        if not self.take or self.first_frame < 0:
            raise ConfigError(
                f"a segment is of take {self.take!r} from frame {self.first_frame} on; expected a name and 0 or more"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentFacts:
    """What a segment's file says of itself.

    ``sound_begin`` and ``sound_end``: the samples of the take at ``rate_hz`` between which its sound is heard, None
    where it has none. ``frames``, ``sound_end`` and ``goes_on`` (whether the take has more behind it) are known once it
    is finished; None where they are not, or nobody said.
    """

    take: str
    first_frame: int
    fps: int
    rate_hz: int
    sound_begin: int | None = None
    sound_end: int | None = None
    frames: int | None = None
    goes_on: bool | None = None

    def to_metadata(self) -> dict[str, str]:
        """As the metadata of a container."""
        return {KEY: json.dumps({"version": _VERSION} | dataclasses.asdict(self))}

    @classmethod
    def from_metadata(cls, metadata: dict[str, str]) -> SegmentFacts | None:
        """None where there are none that this edition understands."""
        try:
            facts = json.loads(metadata.get(KEY, ""))
            if facts.pop("version") != _VERSION:
                return None
            found = cls(**facts)
        except (ValueError, TypeError, KeyError, AttributeError):
            return None
        return found if _sound(found) else None


def sample_at(frame: int, rate_hz: int, fps: int) -> int:
    """The sample of the take at which a video frame begins, rounded up."""
    return -(-frame * rate_hz // fps)


def aac_frames_until(sample: int) -> int:
    """How many AAC frames are heard before ``sample``, the last of them perhaps in part."""
    return -(-sample // AAC_SAMPLES)


def _sound(facts: SegmentFacts) -> bool:
    """Whether numbers read from a file are such as can be written there."""

    def whole(value: Any, least: int) -> bool:
        return type(value) is int and value >= least

    optional = ((facts.sound_begin, 0), (facts.sound_end, 0), (facts.frames, 1))
    return (
        isinstance(facts.take, str)
        and whole(facts.first_frame, 0)
        and whole(facts.fps, 1)
        and whole(facts.rate_hz, 1)
        and all(value is None or whole(value, least) for value, least in optional)
        and facts.goes_on in (None, True, False)
    )
