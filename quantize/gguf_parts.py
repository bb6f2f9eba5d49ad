"""GGUF files that were split: ``NAME-00001-of-00003.gguf`` and so on, which only together are a model.

llama.cpp's gguf-split and the ``gguf`` package write them so. Each part has its number in its fields, and only the
first has the others: the architecture, and the shapes of tensors that were flattened.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowvram_kernels.errors import CheckpointError
from lowvram_quantize.strange import refuse_strange

MAGIC = b"GGUF"
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)\.gguf", re.IGNORECASE)


def open_parts(path: Path) -> dict[Path, Any]:
    """The readers of all parts in order, of the file alone where it is whole.

    Raises:
        CheckpointError: a part is missing, is no GGUF, or is of another set.
    """
    parts = part_files(path)
    missing = [part.name for part in parts if not part.is_file()]
    if len(parts) > 1 and path.is_file() and missing:
        raise CheckpointError(
            f"{path} is one of {len(parts)} parts of a GGUF file, of which {', '.join(missing[:4])} "
            f"{'is' if len(missing) == 1 else 'are'} missing in {path.parent}; fetch all parts into one folder"
        )
    for part in parts:
        refuse_strange(part)
        if len(parts) > 1:
            _check_begins(part)
    readers = {part: _reader(part) for part in parts}
    for number, (part, reader) in enumerate(readers.items()):
        _check_numbers(part, reader, number, len(parts))
    held, wanted = sum(len(reader.tensors) for reader in readers.values()), stated(readers, "split.tensors.count")
    if wanted is not None and held != wanted:
        raise CheckpointError(
            f"{path}: {len(parts)} parts hold {held} tensors, of {wanted}; they are not of one set: fetch all again"
        )
    return readers


def part_files(path: Path) -> list[Path]:
    """All parts of what ``path`` is one of, by its name, whether they are there or not."""
    match = _PART.fullmatch(path.name)
    if match is None or not 0 < int(match["number"]) <= int(match["count"]) <= 9999:
        return [path]
    digits, ending = len(match["number"]), path.name[match.end("number") :]
    return [path.with_name(f"{match['stem']}-{i:0{digits}d}{ending}") for i in range(1, int(match["count"]) + 1)]


def stated(readers: Mapping[Path, Any], name: str) -> Any:
    """A field's value, from the first part that has it; None where none has."""
    fields = (reader.get_field(name) for reader in readers.values())
    return next((field.contents() for field in fields if field is not None), None)


def _check_begins(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(4)
    if head != MAGIC:
        raise CheckpointError(
            f"{path} does not begin as a GGUF file, so the file was cut into pieces of bytes, not split into parts; "
            "join the pieces to one file (cat on Linux), or fetch it whole"
        )


def _reader(path: Path) -> Any:
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except Exception as error:  # a damaged header makes the reader raise nearly anything
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(f"{path} is a damaged or truncated GGUF file ({reason}); fetch it again") from error


def _check_numbers(path: Path, reader: Any, number: int, count: int) -> None:
    """A part's fields count from 0; a file that is whole has none."""
    own = {path: reader}
    said_count, said_number = stated(own, "split.count"), stated(own, "split.no")
    if said_count is None or (said_count == count and said_number in (None, number)):
        return
    if count == 1:
        raise CheckpointError(
            f"{path} is part {int(said_number or 0) + 1} of {said_count} of a GGUF file under another name; put the "
            f"parts into one folder as NAME-{int(said_number or 0) + 1:05d}-of-{int(said_count):05d}.gguf, or join "
            "them with llama.cpp's gguf-split --merge"
        )
    raise CheckpointError(
        f"{path} says that it is part {int(said_number or 0) + 1} of {said_count}, its name that it is part "
        f"{number + 1} of {count}; fetch all parts again"
    )
