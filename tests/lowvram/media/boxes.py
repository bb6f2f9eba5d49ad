"""An MP4's boxes, read by hand: what players look at before they play."""

from __future__ import annotations

from pathlib import Path


def top_level(data: bytes) -> list[str]:
    """Names of an MP4's top-level boxes."""
    return [name for name, _ in _boxes(data)]


def durations_s(path: Path) -> dict[str, float]:
    """Seconds that the index states: of the whole ("movie") and of each track as it is shown ("vide", "soun")."""
    moov = dict(_boxes(path.read_bytes()))["moov"]
    ticks, length = _clock(dict(_boxes(moov))["mvhd"], 12)
    found = {"movie": length / ticks}
    for body in (body for name, body in _boxes(moov) if name == "trak"):
        inside = dict(_boxes(body))
        kind = dict(_boxes(inside["mdia"]))["hdlr"][8:12].decode()
        # tkhd is version 0 here: flags, two times, track, reserved, duration.
        found[kind] = int.from_bytes(inside["tkhd"][20:24], "big") / ticks
    return found


def _clock(body: bytes, at: int) -> tuple[int, int]:
    return int.from_bytes(body[at : at + 4], "big"), int.from_bytes(body[at + 4 : at + 8], "big")


def _boxes(data: bytes) -> list[tuple[str, bytes]]:
    found, offset = [], 0
    while offset + 8 <= len(data):
        size = max(int.from_bytes(data[offset : offset + 4], "big"), 8)
        found.append((data[offset + 4 : offset + 8].decode("latin-1"), data[offset + 8 : offset + size]))
        offset += size
    return found
