"""Where the random full-size artifacts of ``full_size.py`` lie; known to parent and children alike."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

PRECISIONS = ("int8", "bf16")


def artifact_path(folder: Path, preset: str, precision: str) -> Path:
    return folder / f"{preset}-{precision}"


def remove(path: Path) -> None:
    """Remove an artifact that this script made, to make room for another."""
    say(f"{path} is removed to make room; it can be made again")
    shutil.rmtree(path)


def say(text: str) -> None:
    print(f"[full_size] {text}", file=sys.stderr, flush=True)
