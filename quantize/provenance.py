"""Provenance of an artifact: how each tensor is stored, what it was made from, and by which versions."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lowvram_quantize.components import ComponentPlan
from lowvram_quantize.format import (
    CHANNELS_LAST_VERSION,
    FORMAT,
    FORMAT_VERSION,
    LARGEST_GROUPS,
    SMOOTHED_VERSION,
)
from lowvram_quantize.slabs import Slab
from lowvram_quantize.source import TensorRef

_LIBRARIES = ("torch", "diffusers", "transformers", "safetensors", "optimum-quanto", "bitsandbytes")


def component_facts(
    plan: ComponentPlan,
    path: Path,
    slabs: list[Slab],
    header_sha256: str,
    digests: dict[str, str],
    errors: dict[str, float],
) -> dict[str, Any]:
    """A component's entry in the manifest; ``digests`` has each slab's SHA-256, ``errors`` is by tensor."""
    return {
        "file": path.name,
        "precision": plan.precision,
        **({"activations_sha256": plan.activations_sha256} if plan.activations_sha256 else {}),
        "config": plan.config,
        **({"choice": plan.choice} if plan.choice else {}),
        "header_sha256": header_sha256,
        "slabs": [{"name": s.name, "offset": s.offset, "nbytes": s.nbytes, "sha256": digests[s.name]} for s in slabs],
        "tensors": _tensor_facts(plan, errors),
    }


def tensor_origin(ref: TensorRef, base: Path) -> dict[str, Any]:
    """Where a tensor's values were read: the file, its name there, how they are stored, and the scales."""
    origin: dict[str, Any] = {"file": os.path.relpath(ref.file, base), "tensor": ref.name, "kind": ref.kind}
    return origin | ({"scale": [scale.name for scale in ref.scales]} if ref.scales else {})


def _tensor_facts(plan: ComponentPlan, errors: dict[str, float]) -> dict[str, dict[str, Any]]:
    facts: dict[str, dict[str, Any]] = {}
    for item in plan.items:
        facts[item.name] = {"scheme": item.scheme.name}
        if item.scheme.group > 1:
            facts[item.name]["rotated_group"] = item.scheme.group
        if item.scheme.smooth:
            facts[item.name]["smoothed"] = True
        if item.channels_last:
            facts[item.name]["channels_last"] = True
        if item.name in errors:
            facts[item.name]["relative_error"] = errors[item.name]
    return facts


def manifest_of(
    plans: list[ComponentPlan],
    facts: dict[str, dict[str, Any]],
    files: dict[str, dict[str, Any]],
    hashes: dict[Path, str],
    base: Path,
) -> dict[str, Any]:
    loras = [lora.summary() | {"sha256": hashes[lora.file]} for plan in plans for lora in plan.loras]
    return {
        **origin(plans),
        "components": facts,
        "files": files,
        "sources": [
            {"file": os.path.relpath(file, base), "bytes": file.stat().st_size, "sha256": digest}
            for file, digest in sorted(hashes.items())
        ],
        # The first one alone is what programs that know of one LoRA look for.
        "lora": loras[0] if loras else None,
        "loras": loras,
    }


def origin(plans: list[ComponentPlan]) -> dict[str, Any]:
    """The manifest's first fields: format (the lowest version that has what the plans have) and what writes it."""
    group = max((plan.largest_group for plan in plans), default=1)
    lowest = SMOOTHED_VERSION if any(plan.smoothed for plan in plans) else FORMAT_VERSION
    lowest = CHANNELS_LAST_VERSION if any(plan.channels_last for plan in plans) else lowest
    return {
        "format": FORMAT,
        "format_version": min(v for v, largest in LARGEST_GROUPS.items() if group <= largest and v >= lowest),
        "lowvram": version("lowvram"),
        "libraries": versions(),
    }


def versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found
