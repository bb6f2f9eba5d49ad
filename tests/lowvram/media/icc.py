"""ICC profiles made by hand, as cameras and programs put into pictures; and what they mean, by the formulas."""

from __future__ import annotations

import struct

import numpy as np

SRGB = ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060))
DISPLAY_P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
ADOBE_RGB = ((0.640, 0.330), (0.210, 0.710), (0.150, 0.060))
_D65 = (0.3127, 0.3290)
# The Bradford adaptation from D65 to D50, the white of profiles.
_TO_D50 = np.array([[1.0478, 0.0229, -0.0501], [0.0295, 0.9905, -0.0171], [-0.0092, 0.0151, 0.7517]])


def to_xyz(primaries: tuple) -> np.ndarray:
    """Linear RGB to XYZ under D65."""

    def xyz(xy: tuple[float, float]) -> np.ndarray:
        return np.array([xy[0] / xy[1], 1.0, (1 - xy[0] - xy[1]) / xy[1]])

    columns = np.stack([xyz(p) for p in primaries], axis=1)
    return columns * np.linalg.solve(columns, xyz(_D65))


def in_srgb(colour: tuple[int, int, int], primaries: tuple, gamma: float = 2.2) -> np.ndarray:
    """A colour of other primaries and a plain power curve, in 8-bit sRGB."""
    linear = np.linalg.inv(to_xyz(SRGB)) @ to_xyz(primaries) @ (np.array(colour) / 255) ** gamma
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


def rgb_profile(primaries: tuple, gamma: float = 2.2) -> bytes:
    """A version 2 matrix profile."""
    columns = _TO_D50 @ to_xyz(primaries)
    tags = {b"wtpt": _xyz((0.9642, 1.0, 0.8249)), b"desc": _text("made by a test"), b"cprt": _old_text("none")}
    tags |= {name: _xyz(column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns.T, strict=True)}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), _curve(gamma))
    return _profile(b"RGB ", tags)


def grey_profile(gamma: float) -> bytes:
    tags = {b"wtpt": _xyz((0.9642, 1.0, 0.8249)), b"desc": _text("made by a test"), b"cprt": _old_text("none")}
    return _profile(b"GRAY", tags | {b"kTRC": _curve(gamma)})


def _profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    table, body, offset = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        padded = data + bytes(-len(data) % 4)
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += padded
    head = struct.pack(">I4sI4s4s4s", 128 + len(table) + len(body), b"", 0x02400000, b"mntr", space, b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">iii", *(round(v * 65536) for v in (0.9642, 1.0, 0.8249)))
    return head + bytes(128 - len(head)) + table + body


def _xyz(values) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">iii", *(round(float(v) * 65536) for v in values))


def _curve(gamma: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))


def _old_text(text: str) -> bytes:
    return b"text" + bytes(4) + text.encode() + b"\0"


def _text(text: str) -> bytes:
    data = text.encode() + b"\0"
    return b"desc" + bytes(4) + struct.pack(">I", len(data)) + data + bytes(4 + 4 + 2 + 1 + 67)
