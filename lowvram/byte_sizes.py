"""Byte counts as people write and read them."""

from __future__ import annotations

import re

from lowvram_kernels.errors import ConfigError

_BINARY = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_DECIMAL = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
# A letter alone, as in 16g, is what Docker, Java and Slurm make of it: binary.
_UNITS = {
    "b": 1,
    "byte": 1,
    "bytes": 1,
    **{f"{letter}{end}": size for letter, size in _BINARY.items() for end in ("", "i", "ib")},
    **{f"{letter}b": size for letter, size in _DECIMAL.items()},
}
# Numbers without a unit are GiB up to here; beyond it somebody counted MiB, as nvidia-smi does, or bytes.
_MOST_GIB = 2**12
_EXPECTED = "expected a number with a unit, as 22.15GiB, 16g, 24GB or 16384MiB, or a number alone for GiB"


def parse_bytes(text: str, option: str = "") -> int:
    """ "22.15GiB", "16g", "24 GB" (10^9 each), "16384MiB" or "17179869184B" -> bytes; "16" without a unit is GiB.

    Args:
        text: as a person wrote it.
        option: what it was given for, as "--vram", to be named where it cannot be used.

    Raises:
        ConfigError: it is no number with a known unit, no byte of memory or more than there can
            be, or a number without a unit that would be too many GiB.
    """
    said = f"{option} is {text!r:.60}" if option else f"{text!r:.60}"
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([a-z]*)\s*", text.lower(), flags=re.ASCII)
    if match is None or (match[2] and match[2] not in _UNITS):
        raise ConfigError(f"{said}, which is no amount of memory; {_EXPECTED}")
    number, unit = float(match[1]), match[2]
    if not unit and number > _MOST_GIB:
        meant = f"{number:.0f}MiB or {number / 2**10:.4g}GiB" if number < 2**20 else f"{number / 2**30:.4g}GiB"
        raise ConfigError(f"{said}: without a unit that would be as many GiB; say what is meant, as {meant}")
    size = number * _UNITS[unit or "gib"]
    if not 1 <= size < 2**63:
        raise ConfigError(f"{said}, which is {'too much' if size > 1 else 'no memory'}; {_EXPECTED}")
    return int(size)


def gib(nbytes: float) -> str:
    """Bytes -> "22.15 GiB"."""
    return f"{gib_number(nbytes)} GiB"


def gib_number(nbytes: float) -> str:
    """Bytes -> "22.15", where a table's heading says GiB."""
    return f"{nbytes / 2**30:.2f}"
