"""A file of weights of any form and name as the table of one component."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from lowvram_kernels.errors import CheckpointError
from lowvram_quantize.gguf_file import architecture_of, open_gguf
from lowvram_quantize.gguf_parts import MAGIC
from lowvram_quantize.pickled import open_pth
from lowvram_quantize.pickled_legacy import BEGIN
from lowvram_quantize.recognise import FETCH, WANTED, Part, parts_of, said
from lowvram_quantize.scaled import MARKERS, with_scales
from lowvram_quantize.source import TensorTable, open_index, open_safetensors
from lowvram_quantize.strange import refuse_strange

log = logging.getLogger(__name__)

INDEX_SUFFIX = ".safetensors.index.json"
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)\.safetensors")
_PICKLED = (b"PK\x03\x04", BEGIN[:9])


def open_table(path: Path) -> TensorTable:
    """Every tensor of a file under the file's names, with its scales put in. The form is taken from the first bytes.

    Raises:
        CheckpointError: missing, damaged, stored in a way that is not read, or something else than weights.
    """
    if path.name.endswith(INDEX_SUFFIX):
        return with_scales(path, open_index(path))
    refuse_strange(path)
    head = _head(path)
    other = head.startswith(_PICKLED) or head[8:] == b"{"
    if head.startswith(MAGIC) or (path.suffix.lower() == ".gguf" and not other):
        return open_gguf(path)
    # safetensors begin with the length of a JSON object; what is none of all this is judged by its name.
    pickled = head.startswith(_PICKLED) if other else path.suffix in (".pth", ".pt", ".bin", ".ckpt")
    return with_scales(path, open_pth(path) if pickled else open_safetensors(path))


def is_gguf(path: Path) -> bool:
    return _head(path).startswith(MAGIC)


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(9)


def open_component(path: Path, kind: str) -> TensorTable:
    """The tensors of one component, its prefix taken off; ``kind`` as in ``recognise.WANTED``.

    Raises:
        CheckpointError: the file holds something else, which the error names; or ``open_table``'s.
    """
    _refuse_shard(path)
    table = open_table(path)
    parts = parts_of(table)
    own = [part for part in parts if part.kind == kind]
    if not own:
        gguf = f" (a GGUF of the architecture {architecture_of(path)!r})" if is_gguf(path) else ""
        raise CheckpointError(f"{path}{gguf} holds {said(parts)}; expected {WANTED[kind]}: {FETCH[kind]}")
    if len(own) > 1:
        prefixes = " and ".join(repr(part.prefix) for part in own)
        raise CheckpointError(f"{path} holds {WANTED[kind]} twice, under {prefixes}; expected it once: save one alone")
    return _without_prefix(path, table, own[0], [part for part in parts if part is not own[0]])


def _refuse_shard(path: Path) -> None:
    match = _SHARD.fullmatch(path.name)
    if match is None or int(match["count"]) < 2:
        return
    index = path.with_name(match["stem"] + INDEX_SUFFIX)
    advice = f"name {index.name}" if index.is_file() else f"fetch {index.name} and all shards, and name that"
    raise CheckpointError(
        f"{path} is shard {int(match['number'])} of {int(match['count'])}, which its index puts together: {advice}"
    )


def _without_prefix(path: Path, table: TensorTable, part: Part, others: list[Part]) -> TensorTable:
    own = {name.removeprefix(part.prefix): ref for name, ref in table.items() if name.startswith(part.prefix)}
    known = tuple(other.prefix for other in others if other.prefix)
    if part.prefix:
        left = [n for n in table if not n.startswith((part.prefix, *known)) and n not in MARKERS]
        if left:
            log.warning("%s: %d tensors beside %s are left out, as %s", path, len(left), part.what, left[0])
        return own
    return {name: ref for name, ref in own.items() if not (known and name.startswith(known))}
