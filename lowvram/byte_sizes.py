"""Byte counts as people write and read them."""

from __future__ import annotations

import re

from lowvram_kernels.errors import ConfigError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_bytes(text: str) -> int:
    """ "22.15GiB", "24 GB", "16384MiB" or plain bytes -> bytes.

    Raises:
        ConfigError: it is no number with a known unit, or not above 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if not match or match[2].lower() not in _UNITS or float(match[1]) == 0:
        raise ConfigError(f"{text!r} is no amount of memory; expected one as 22.15GiB, 24GB or 16384MiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def gib(nbytes: float) -> str:
    """Bytes -> "22.15 GiB"."""
    return f"{nbytes / 2**30:.2f} GiB"
