"""Measurements of a card, kept in the user's cache folder as one JSON object by key."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lowvram"


def read_cache(file: Path, what: str, parse: Callable[[Any], T]) -> dict[str, T]:
    """Everything in ``file`` by key. A file that cannot be used is said (``what`` it holds) and counts as empty."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        return {key: parse(values) for key, values in stored.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        log.warning("%s cannot be used (%s): %s are measured again", file, error, what)
        return {}


def write_cache(file: Path, what: str, values: Mapping[str, Any]) -> None:
    """Replace ``file``; where it cannot be written that is said and does no harm."""
    text = json.dumps(dict(values), indent=1)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Two runs may write at once: each replaces the file as a whole.
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as partial:
            partial.write(text)
        os.replace(partial.name, file)
    except OSError as error:
        log.warning("%s cannot be written (%s): %s are measured again the next time", file, error, what)
