"""Manifest: what it has to hold before anything is read from it."""

from __future__ import annotations

from pathlib import Path
from types import NoneType
from typing import Any

from lowvram_kernels.errors import CheckpointError

# A part's fields and their types; a field that is a key here is a list or dictionary of such parts.
_FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "manifest": {"lowvram": str, "libraries": dict, "components": dict, "files": dict, "sources": list},
    "components": {"file": str, "precision": str, "config": dict, "header_sha256": str, "slabs": list, "tensors": dict},
    "slabs": {"name": str, "offset": int, "nbytes": int, "sha256": str},
    "tensors": {"scheme": str},
    "files": {"bytes": int, "sha256": str},
    "sources": {"file": str, "bytes": int, "sha256": str},
    "lora": {"file": str, "sha256": str, "alpha": (int, float), "ranks": list, "merged": int, "replaced": int},
    "loras": {"file": str, "sha256": str, "weight": (int, float), "alphas": list, "ranks": list},
    "from": {"file": str, "tensor": str, "kind": str},
    "phantom": {"preset": str, "values": str},
    # Of an artifact that was calibrated; what reads weights looks past it.
    "calibration": {
        "image": (dict, NoneType),
        "audio": (dict, NoneType),
        "prompt": str,
        "size": list,
        "frames": int,
        "steps": int,
        "device": str,
        "dtype": str,
        "linears": dict,
    },
    "calibrated on": {"file": str, "sha256": str},
    "measured": {"file": str, "bytes": int, "sha256": str},
    "statistics": dict.fromkeys(("amax", "rms", "channel_ratio", "kurtosis", "dead"), (int, float, NoneType)),
    "linears": {"scheme": str, "rows": int, "output_error": (int, float, NoneType), "activations": dict},
}


def check_manifest(
    file: Path, manifest: Any, largest_group: int, *, smoothed: bool = True, channels_last: bool = True
) -> None:
    """``largest_group``: of the channels that its format version may have rotated together; ``smoothed`` and
    ``channels_last``: whether it may have such weights.

    Raises: CheckpointError where the manifest, or a part of it, is not as ``convert`` writes it.
    """
    _check_part(file, "manifest", manifest)
    for component in manifest["components"].values():
        _check_rotation(file, component["tensors"], largest_group)
        _check_smoothing(file, component["tensors"], smoothed)
        _check_order(file, component["tensors"], channels_last)
        for facts in component["tensors"].values():
            if "from" in facts:
                _check_part(file, "from", facts["from"])
    loras = manifest.get("loras", [])
    for lora in loras if isinstance(loras, list) else [loras]:
        _check_part(file, "loras", lora)
        if any(type(number) not in (int, float) for number in (*lora["alphas"], *lora["ranks"])):
            raise CheckpointError(f"{file} is damaged: a LoRA whose alphas or ranks are no numbers; convert again")
    for part in ("lora", "phantom", "calibration"):
        if manifest.get(part) is not None:
            _check_part(file, part, manifest[part])
    calibration = manifest.get("calibration") or {}
    for part in ("image", "audio"):
        if calibration.get(part) is not None:
            _check_part(file, "calibrated on", calibration[part])
    if "activations" in calibration:
        _check_part(file, "measured", calibration["activations"])
        if Path(calibration["activations"]["file"]).name != calibration["activations"]["file"]:
            raise CheckpointError(
                f"{file} is damaged: activations in {calibration['activations']['file']}; expected a file beside it: "
                "calibrate again"
            )
    for linear in calibration.get("linears", {}).values():
        _check_part(file, "statistics", linear["activations"])


def _check_rotation(file: Path, tensors: dict[str, dict[str, Any]], largest: int) -> None:
    """Nothing but the inputs of W8A8 INT8 weights is rotated at run time."""
    for name, facts in tensors.items():
        if "rotated_group" not in facts:
            continue
        group = facts["rotated_group"]
        if type(group) is not int or not 2 <= group <= largest or facts["scheme"] != "int8":
            raise CheckpointError(
                f"{file} is damaged: {name} ({facts['scheme']}) would be rotated in groups of {group!r}; expected "
                f"{f'groups of 2 to {largest}, in int8' if largest > 1 else 'none in its format version'}: "
                "convert again"
            )


def _check_smoothing(file: Path, tensors: dict[str, dict[str, Any]], known: bool) -> None:
    """As of ``_check_rotation``."""
    for name, facts in tensors.items():
        if "smoothed" in facts and (facts["smoothed"] is not True or facts["scheme"] != "int8" or not known):
            raise CheckpointError(
                f"{file} is damaged: {name} ({facts['scheme']}) says smoothed: {facts['smoothed']!r}; expected "
                f"{'true, in int8' if known else 'none in its format version'}: convert again"
            )


def _check_order(file: Path, tensors: dict[str, dict[str, Any]], known: bool) -> None:
    for name, facts in tensors.items():
        if "channels_last" in facts and (facts["channels_last"] is not True or not known):
            raise CheckpointError(
                f"{file} is damaged: {name} says channels_last: {facts['channels_last']!r}; expected "
                f"{'true' if known else 'none in its format version'}: convert again"
            )


def _check_part(file: Path, kind: str, value: Any) -> None:
    fields = _FIELDS[kind]
    for name, types in fields.items():
        if not isinstance(value, dict) or not isinstance(value.get(name), types):
            raise CheckpointError(
                f"{file} is damaged: {kind} without a usable {name}; expected what convert writes: convert again"
            )
        if name in _FIELDS:
            parts = value[name].values() if isinstance(value[name], dict) else value[name]
            for part in parts:
                _check_part(file, name, part)
