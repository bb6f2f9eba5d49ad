"""Layer formats of ComfyUI's quantized files: what they say, and which of it can be read as values times a scale.

It is said in one of two places, as JSON:
    the file's metadata "_quantization_metadata"    {"layers": {"blocks.0.ffn.0": {"format": "float8_e4m3fn"}}}
    a tensor of bytes beside the weight             blocks.0.ffn.0.comfy_quant: {"format": "int8_tensorwise"}
Formats and options are those of ComfyUI's QUANTIZATION.md and of the converters that write for it; whatever is not in
the tables below is refused, since codes that are taken for weights give noise without any error.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lowvram_kernels.errors import CheckpointError
from lowvram_quantize.slabs import read_header
from lowvram_quantize.source import TensorTable

log = logging.getLogger(__name__)

BLOCK = 128
BESIDE = ".comfy_quant"
ADVICE = "fetch its bf16, fp8 or GGUF edition"
_METADATA = "_quantization_metadata"
_READ = {
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e4m3fn_rowwise": torch.float8_e4m3fn,
    "float8_e4m3fn_blockwise": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "int8_tensorwise": torch.int8,
    "int8_rowwise": torch.int8,
    "int8_blockwise": torch.int8,
}
_UNREAD = {
    "nvfp4": "4 bit in blocks of 16",
    "mxfp4": "4 bit in blocks of 32",
    "mxfp8": "8 bit in blocks of 32 with scales that are powers of two",
    "convrot_w4a4": "4 bit, rotated",
    "asym_w4a8_int8": "4 bit with a code book",
    "svdquant_w4a4": "4 bit beside a low-rank part",
}
# Options that change nothing in what the weight is: how products are computed, and what it was before.
_HARMLESS = ("format", "full_precision_matrix_mult", "per_channel", "orig_dtype", "orig_shape", "convrot_groupsize")
_BLOCKS = ("group_size", "block_size")


@dataclasses.dataclass(frozen=True)
class Stored:
    """A layer's format, the dtype of its codes, and the edge of its blocks where it has one scale for each."""

    format: str
    dtype: torch.dtype
    block: int = BLOCK


def layer_formats(path: Path, table: TensorTable) -> dict[str, Stored]:
    """The formats that a file states, by the names of the weights.

    Raises:
        CheckpointError: what is stated is no such JSON, or a format or option that is not read.
    """
    found: dict[str, Stored] = {}
    for layer, where, facts in (*_beside(path, table), *_in_metadata(path, table)):
        stored = _stored(where, facts)
        weight = _weight(table, layer)
        if weight is None:
            log.warning("%s, but there is no %s.weight: passed over", where, layer)
        elif found.setdefault(weight, stored) != stored:
            raise CheckpointError(f"{where} says {stored.format!r}, {layer}{BESIDE} says otherwise; fetch it again")
    return found


def _beside(path: Path, table: TensorTable) -> Iterator[tuple[str, str, Any]]:
    for name, ref in table.items():
        if name.endswith(BESIDE):
            try:
                facts = json.loads(bytes(ref.read_bytes(0, min(ref.nbytes, 1 << 16))))
            except (ValueError, RecursionError) as error:
                raise CheckpointError(f"{path}: {name} holds no JSON with a format; fetch it again") from error
            yield name.removesuffix(BESIDE), f"{path}: {name}", facts


def _in_metadata(path: Path, table: TensorTable) -> Iterator[tuple[str, str, Any]]:
    for file in sorted({ref.file for ref in table.values()}):
        text = _metadata(file).get(_METADATA)
        if text is None:
            continue
        try:
            layers = json.loads(text)["layers"].items()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{file}: its metadata {_METADATA} holds no JSON with layers, so how its weights are stored is not "
                "known; fetch it again"
            ) from error
        yield from ((layer, f"{file}: {_METADATA} of {layer}", facts) for layer, facts in layers)


def _metadata(file: Path) -> dict[str, Any]:
    """A safetensors file's; a pickle has none."""
    with file.open("rb") as opened:
        if opened.read(9)[8:] != b"{":
            return {}
    metadata = read_header(file)[0].get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def _stored(where: str, facts: Any) -> Stored:
    facts = {"format": facts} if isinstance(facts, str) else facts  # some converters write the name alone
    name = facts.get("format") if isinstance(facts, dict) else None
    if not isinstance(name, str):
        raise CheckpointError(f"{where} holds no JSON with a format; fetch it again")
    if name not in _READ:
        what = f" ({_UNREAD[name]})" if name in _UNREAD else ""
        raise CheckpointError(f"{where} says {name!r}{what}, which is not read; read are {', '.join(_READ)}: {ADVICE}")
    options = {key: value for key, value in facts.items() if key != "params"} | _nested(facts)
    strange = {key: value for key, value in options.items() if value and key not in (*_HARMLESS, *_BLOCKS)}
    if strange:
        key, value = next(iter(strange.items()))
        what = "a rotated weight" if "rot" in key else "an option that is not known"
        raise CheckpointError(f"{where} says {name!r} with {key} = {value!r}, {what}, which is not read; {ADVICE}")
    return Stored(name, _READ[name], _block(where, name, options))


def _nested(facts: dict[str, Any]) -> dict[str, Any]:
    params = facts.get("params") or {}
    return params if isinstance(params, dict) else {"params": params}


def _block(where: str, name: str, options: dict[str, Any]) -> int:
    block = next((options[key] for key in _BLOCKS if options.get(key) is not None), BLOCK)
    if type(block) is not int or block < 1:
        raise CheckpointError(f"{where} says {name!r} in blocks of {block!r}; expected a number above 0: {ADVICE}")
    return block


def _weight(table: TensorTable, layer: str) -> str | None:
    """The weight of a layer, which may be named without the file's prefix."""
    name = f"{layer}.weight"
    if name in table:
        return name
    own = [other for other in table if other.endswith(f".{name}")]
    return own[0] if len(own) == 1 else None
