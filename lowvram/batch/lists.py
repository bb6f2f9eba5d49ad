"""Lists of jobs: JSON, CSV, or what Live Avatar's ``batch_eval.py`` takes as ``--sample_list``, JSON or YAML.

A list's paths are relative to the folder that it lies in.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Any

import yaml

from lowvram.media.several import joined, names_of
from lowvram_kernels.errors import InputError

log = logging.getLogger("lowvram.plan")
_MOST_BYTES = 16 << 20
_MOST_JOBS = 10_000
# Of the reference's other scripts, and what people write.
_ALSO = {"seed": "base_seed", "steps": "sample_steps", "save_file": "out", "output": "out", "clips": "num_clip"}
_ALSO |= {"mask": "masks"}
_IGNORED = ("comment",)
_PATHS = ("image", "audio", "pose_video")
EXPECTED = (
    'a list of jobs: JSON, as [{"image": ..., "audio": ..., "prompt": ...}, ...] or {"name": {...}, ...}, YAML '
    "likewise, or CSV with these columns"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listed:
    """A job as it stands in a list: which one it is, from 1 on, what it is called ("" where it has no name), its
    settings by their options' names, and what is wrong with it, "" where nothing is."""

    place: int
    name: str
    settings: dict[str, Any]
    wrong: str = ""


def read_list(path: Path, known: frozenset[str]) -> list[Listed]:
    """The jobs in their order; ``known`` are names of settings that one may have.

    Raises:
        InputError: the file is missing, too large, or not such a list.
    """
    entries = _entries(path, _text(path))
    if not entries:
        raise InputError(f"{path} has no job in it; expected {EXPECTED}")
    if len(entries) > _MOST_JOBS:
        raise InputError(f"{path} has {len(entries)} jobs; expected {_MOST_JOBS} at the most, make several lists of it")
    return [_listed(place, name, entry, path.parent, known) for place, (name, entry) in enumerate(entries, 1)]


def _text(path: Path) -> str:
    if not path.is_file():
        raise InputError(f"{path} is no file; expected {EXPECTED}")
    try:
        if (size := path.stat().st_size) > _MOST_BYTES:
            raise InputError(f"{path} has {size} bytes; expected {EXPECTED}, of {_MOST_BYTES} at the most")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text in UTF-8 ({error.reason}); save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the file") from error


def _entries(path: Path, text: str) -> list[tuple[str, Any]]:
    """Names, "" where there is none, and what stands behind them."""
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv"):
        return [("", row) for row in _rows(path, text)]
    if kind not in (".json", ".yaml", ".yml"):
        raise InputError(f"{path} ends in {kind or 'nothing'!r}; expected .json, .csv, .tsv, .yaml or .yml: {EXPECTED}")
    try:
        found = json.loads(text, object_pairs_hook=_once) if kind == ".json" else yaml.load(text, _Loader)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise InputError(f"{path} is no {kind[1:].upper()} ({said}); expected {EXPECTED}") from error
    if isinstance(found, dict):
        return [(str(name), entry) for name, entry in found.items()]
    if isinstance(found, list):
        return [("", entry) for entry in found]
    raise InputError(f"{path} holds {type(found).__name__}; expected {EXPECTED}")


def _once(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """Raises: ValueError for a name that stands twice, of which one would be lost."""
    found: dict[Any, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} stands twice")
        found[name] = value
    return found


class _Loader(yaml.SafeLoader):
    """Data alone, and no name twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        self.flatten_mapping(node)
        try:
            return _once(
                [
                    (self.construct_object(key, deep=True), self.construct_object(value, deep=True))
                    for key, value in node.value
                ]
            )
        except TypeError as error:  # a list as a name
            raise ValueError(str(error)) from error


def _rows(path: Path, text: str) -> list[dict[str, Any]]:
    """Rows of a table with a heading; its cells are divided as the heading's are."""
    heading = text.partition("\n")[0]
    delimiter = max(",;\t", key=heading.count)
    try:
        rows = list(csv.reader(text.splitlines(keepends=True), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise InputError(f"{path} is no CSV ({error}); expected {EXPECTED}") from error
    columns, jobs = [name.strip() for name in rows[0]] if rows else [], []
    if len(set(columns)) < len(columns) or "" in columns:
        raise InputError(f"{path} has the columns {', '.join(columns)}; expected a name for each, and no two alike")
    for number, row in enumerate(rows[1:], 2):
        if not any(cell.strip() for cell in row):
            continue
        if len(row) > len(columns):
            raise InputError(
                f"{path} has {len(row)} cells in row {number} and {len(columns)} columns; expected no more, put "
                f"what holds a {delimiter!r} in quotes"
            )
        jobs.append({name: cell.strip() for name, cell in zip(columns, row, strict=False) if cell.strip()})
    return jobs


def _listed(place: int, name: str, entry: Any, folder: Path, known: frozenset[str]) -> Listed:
    if not isinstance(entry, dict):
        said = f"is {type(entry).__name__}; expected settings with their names"
        return Listed(place=place, name=name, settings={}, wrong=said)
    settings: dict[str, Any] = {}
    for key, value in entry.items():
        option = str(key).strip().removeprefix("--").replace("-", "_").lower()
        option = _ALSO.get(option, option)
        if option in _IGNORED or value is None:
            continue
        if option == "name":
            name = str(value)
        elif option not in known:
            said = f"has the setting {key!r}; expected {', '.join(sorted(known | {'name'}))}"
            return Listed(place=place, name=name, settings={}, wrong=said)
        elif option in settings:
            return Listed(place=place, name=name, settings={}, wrong=f"has {option} twice; leave one out")
        else:
            settings[option] = value
    for option in _PATHS:
        if isinstance(path := settings.get(option), str) and path:
            settings[option] = joined(_all_resolved(path, folder, option))
    if isinstance(masks := settings.get("masks"), str | list):
        named = [masks] if isinstance(masks, str) else masks
        if all(isinstance(mask, str) and mask for mask in named):
            settings["masks"] = [path for mask in named for path in _all_resolved(mask, folder, "mask")]
    if isinstance(prompt := settings.get("prompt"), str):
        settings["prompt"] = _prompt(prompt, folder)
    return Listed(place=place, name=name, settings=settings)


def _prompt(text: str, folder: Path) -> str:
    """What is meant by @FILE, or by the name of a file there, with its whole path."""
    if text.startswith("@"):
        return f"@{_resolved(text[1:], folder, 'prompt')}"
    try:
        return f"@{folder / text}" if text and (folder / text).is_file() else text
    except (OSError, ValueError):  # too long for a name, or holding what no name can
        return text


def _all_resolved(text: str, folder: Path, option: str) -> list[Path]:
    """Each of "a.wav+b.wav"."""
    names = names_of(Path(text), folder)
    if len(names) == 1 and not os.path.lexists(folder / text):
        names = names_of(Path(text))
    return [_resolved(str(name), folder, option) for name in names]


def _resolved(text: str, folder: Path, option: str) -> Path:
    """The reference's lists have paths from where it is started: such are found too, and said."""
    path = folder / text
    try:
        if not path.exists() and Path(text).exists():
            log.info("%s %s is not in the list's folder %s, and taken from the working directory", option, text, folder)
            return Path(text).absolute()
    except (OSError, ValueError):
        pass
    return path
