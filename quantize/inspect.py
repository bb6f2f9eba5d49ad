"""Inspection of an artifact, for a program (``describe``) and for a person (``summary``)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from lowvram_kernels.errors import CheckpointError
from lowvram_quantize.format import CALIBRATION, Artifact, Component
from lowvram_quantize.sensitivity import role_of

NOT_CALIBRATED = (
    "not calibrated: lowvram convert --calibrate, with the same source and --out, measures what the outputs of layers "
    "lose"
)
_SHOWN = 5
"""Of the worst Linears."""


def describe(path: str | Path, *, verify: bool = False) -> dict[str, Any]:
    """Facts of an artifact, ready for JSON: versions, sources, LoRA, and for each component precision, bytes, schemes,
    slabs, rotated groups (channels in a group -> weights), smoothed and channels-last weights, what a mixed one was
    chosen from, and relative weight errors (norm; the worst and the mean of a slab's quantized tensors). Where it was
    calibrated, the manifest's ``calibration``, and its ``output_error``: mean and worst of the relative errors at the
    outputs of the DiT's Linears.

    Args:
        path: the artifact's folder.
        verify: read every byte and compare the checksums first; ``verified`` says whether that was done.

    Raises:
        CheckpointError: no artifact, a damaged one, or one of another format version.
    """
    artifact = Artifact.open(path, verify=verify)
    manifest = artifact.manifest
    try:
        return {
            "path": str(artifact.path),
            **{key: manifest[key] for key in ("format", "format_version", "lowvram", "libraries")},
            "verified": verify,
            "bytes": sum(file.stat().st_size for file in artifact.path.rglob("*") if file.is_file()),
            "components": {name: _component(artifact.component(name)) for name in artifact.precisions()},
            "files": {name: facts["bytes"] for name, facts in manifest["files"].items()},
            "lora": manifest["lora"],
            "loras": manifest.get("loras", [manifest["lora"]] if manifest["lora"] else []),
            "phantom": manifest.get("phantom"),
            "calibration": manifest.get(CALIBRATION),
            "output_error": _worst(output_errors(manifest.get(CALIBRATION))),
            "sources": manifest["sources"],
        }
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{artifact.path}: the manifest lacks {error}; convert the checkpoint again") from error


def output_errors(calibration: dict[str, Any] | None) -> dict[str, float]:
    """By weight, of those whose output is not zero alone."""
    linears = (calibration or {}).get("linears", {})
    return {name: each["output_error"] for name, each in linears.items() if each["output_error"] is not None}


def _component(component: Component) -> dict[str, Any]:
    facts = component.facts
    errors = {name: t["relative_error"] for name, t in facts["tensors"].items() if "relative_error" in t}
    return {
        "file": facts["file"],
        "precision": component.precision,
        "bytes": component.path.stat().st_size,
        "tensors": len(facts["tensors"]),
        "schemes": dict(Counter(t["scheme"] for t in facts["tensors"].values())),
        "rotated_groups": {str(group): count for group, count in sorted(_groups(component).items(), reverse=True)},
        "activations_sha256": facts.get("activations_sha256"),
        "smoothed": sum(component.tensor_smoothed(name) for name in facts["tensors"]),
        "channels_last": sum(component.tensor_channels_last(name) for name in facts["tensors"]),
        "config": component.config,
        "choice": facts.get("choice"),
        "relative_error": _worst(errors),
        "slabs": [_slab(component, name, errors) for name in component.slab_names],
        "relative_errors": errors,
    }


def _groups(component: Component) -> Counter[int]:
    """How many weights have groups of so many input channels rotated."""
    groups = (component.tensor_group(name) for name in component.facts["tensors"])
    return Counter(group for group in groups if group > 1)


def _slab(component: Component, slab: str, errors: dict[str, float]) -> dict[str, Any]:
    stored = {spec.name.removesuffix("._data") for spec in component.slab_specs(slab)}
    own = {name: error for name, error in errors.items() if name in stored}
    schemes = Counter(component.tensor_scheme(name) for name in component.facts["tensors"] if name in stored)
    return {
        "name": slab,
        "bytes": component.slab_nbytes(slab),
        "schemes": dict(schemes),
        "relative_error": _worst(own),
    }


def _worst(errors: dict[str, float]) -> dict[str, Any] | None:
    """None where nothing is quantized."""
    if not errors:
        return None
    worst = max(errors, key=errors.__getitem__)
    return {"mean": sum(errors.values()) / len(errors), "worst": errors[worst], "worst_tensor": worst}


def summary(facts: dict[str, Any]) -> str:
    """``describe``'s facts as plain text, a line for each component, slab, copied file and source."""
    libraries = ", ".join(f"{name} {version}" for name, version in facts["libraries"].items())
    lines = [
        f"{facts['path']}: {facts['format']} version {facts['format_version']}, {_size(facts['bytes'])}, "
        f"checksums {'verified' if facts['verified'] else 'not read (--verify reads them)'}",
        f"made by lowvram {facts['lowvram']} with {libraries}",
        *([_lora_line(lora) for lora in facts["loras"]] or ["no LoRA was merged"]),
    ]
    if facts["phantom"]:
        shapes = facts["phantom"]
        lines.append(f"shape artifact of preset {shapes['preset']}: {shapes['values']}, no checksums")
    for name, component in facts["components"].items():
        lines += ["", *_component_lines(name, component)]
    lines += ["", *([] if facts["phantom"] else _calibration_lines(facts))]
    lines += ["", "copied"] + [f"  {name:<44}{_size(size):>12}" for name, size in facts["files"].items()]
    lines += ["", "made from"]
    lines += [f"  {s['file']:<60}{_size(s['bytes']):>12}  sha256 {s['sha256'][:16]}" for s in facts["sources"]]
    return "\n".join(lines)


def _lora_line(lora: dict[str, Any]) -> str:
    ranks = ", ".join(map(str, lora["ranks"])) or "none"
    weight = f"weight {lora['weight']:g}, " if lora.get("weight", 1) != 1 else ""
    alphas = ", ".join(f"{alpha:g}" for alpha in lora.get("alphas", [lora["alpha"]])) or "none"
    return (
        f"LoRA {lora['file']} merged: {weight}alpha {alphas}, rank {ranks}, {lora['merged']} layers updated, "
        f"{lora['replaced']} tensors replaced"
    )


def _component_lines(name: str, component: dict[str, Any]) -> list[str]:
    schemes = ", ".join(f"{count} {scheme}" for scheme, count in component["schemes"].items())
    lines = [
        f"{name}: {component['precision']}, {component['file']}, {_size(component['bytes'])}, "
        f"{component['tensors']} tensors ({schemes})"
    ]
    lines += _choice_lines(component["choice"])
    smoothed = component["smoothed"]
    by = component["activations_sha256"]
    by = f", by measured activations, sha256 {by[:16]}" if by else ""
    lines += [f"  inputs of {smoothed} weights smoothed, channel by channel{by}"] if smoothed else []
    last = component["channels_last"]
    lines += [f"  weights of {last} convolutions channels-last, as they are computed with"] if last else []
    groups = component["rotated_groups"].items()
    lines += [f"  inputs of {count} weights rotated in groups of {group} channels" for group, count in groups]
    return lines + [
        f"  {slab['name']:<44}{_size(slab['bytes']):>12}{_error_text(slab['relative_error'])}"
        for slab in component["slabs"]
    ]


def _calibration_lines(facts: dict[str, Any]) -> list[str]:
    """What it was calibrated on, and where outputs lose most; or how to have that."""
    calibration, error = facts["calibration"], facts["output_error"]
    errors, lines = output_errors(calibration), [in_words(facts)]
    if error is not None:
        lines.append(f"  output error of {len(errors)} Linears {error['mean']:.2%} mean; the worst:")
    for name in sorted(errors, key=errors.__getitem__, reverse=True)[:_SHOWN]:
        ratio = calibration["linears"][name]["activations"]["channel_ratio"]
        apart = "" if ratio is None else f"  largest input channel {ratio:.1f} times the median"
        lines.append(f"  {name:<52}{errors[name]:>8.2%}{apart}")
    return lines


def in_words(facts: dict[str, Any]) -> str:
    """What an artifact was calibrated on: portrait, voice, size, length and machine; or how to calibrate it."""
    calibration = facts["calibration"]
    if calibration is None:
        return "shapes alone cannot be calibrated" if facts["phantom"] else NOT_CALIBRATED
    own = {"image": "a drawn portrait", "audio": "a synthesized voice"}
    names = [file["file"] if (file := calibration.get(part)) else drawn for part, drawn in own.items()]
    size = "x".join(map(str, calibration["size"]))
    return (
        f"calibrated on {names[0]} and {names[1]}: {calibration['frames']} frames of {size} px in "
        f"{calibration['steps']} steps, on {calibration['device']} in {calibration['dtype']}"
    )


def _choice_lines(choice: dict[str, Any] | None) -> list[str]:
    """Of a mixed component: within what it was chosen, and of each kind of layers how many are stored in what."""
    if choice is None:
        return []
    target = choice["target_bytes"]
    how = "by what a run measured" if choice["measured"] else "by a table of kinds of layers"
    within = f"an error of {choice['max_error']:.3g}" if target is None else f"{target} bytes"
    lines = [f"  chosen within {within}, predicted error of the output {choice['predicted_error']:.3g}, {how}"]
    kinds: dict[str, Counter[str]] = {}
    for unit, facts in choice["units"].items():
        kinds.setdefault(role_of(unit), Counter())[facts["scheme"]] += 1
    for kind, counts in kinds.items():
        lines.append(f"    {kind:<42}" + ", ".join(f"{count} {scheme}" for scheme, count in sorted(counts.items())))
    return lines


def _error_text(error: dict[str, Any] | None) -> str:
    if error is None:
        return ""
    return f"  weight error {error['mean']:.2%} mean, {error['worst']:.2%} worst ({error['worst_tensor']})"


def _size(nbytes: int) -> str:
    value, unit = float(nbytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
