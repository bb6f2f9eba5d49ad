"""The artifact on disk: what ``convert`` writes and the runtime maps.

A folder with ``manifest.json``, one plain safetensors file a component, and the copied folders ``audio_encoder/`` and
``tokenizer/``. In a component's file tensors lie in *slabs*: stretches that can be copied to a device in one piece; see
``slabs``.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from lowvram_kernels.errors import CheckpointError
from lowvram_kernels.rotation import GROUP, SYLVESTER
from lowvram_quantize.manifest import check_manifest
from lowvram_quantize.slabs import DTYPES, PAD, Slab, TensorSpec, read_header, sha256_file, sha256_range

Tensor = torch.Tensor

FORMAT = "lowvram-artifact"
FORMAT_VERSION = 1
# Of an artifact with rotated weights: a program that reads version 1 alone would multiply them with unrotated inputs,
# and one that reads up to version 2 would rotate inputs in groups above 16 by another matrix.
ROTATED_VERSION = 2
LARGE_GROUPS_VERSION = 3
# Of one with weights that were smoothed, as well: their inputs are to be multiplied by factors that stand beside them.
SMOOTHED_VERSION = 4
# Of one with the weights of convolutions in the order in which they are computed with, as well.
CHANNELS_LAST_VERSION = 5
# The largest group of rotated channels that a version has; see ``lowvram_kernels.rotation``.
LARGEST_GROUPS = {
    FORMAT_VERSION: 1,
    ROTATED_VERSION: SYLVESTER,
    LARGE_GROUPS_VERSION: GROUP,
    SMOOTHED_VERSION: GROUP,
    CHANNELS_LAST_VERSION: GROUP,
}
SMOOTH_SCALE = "smooth_scale"
"""How the factors are called, beside a layer's ``weight``."""
MANIFEST = "manifest.json"
CALIBRATION = "calibration"
"""A key of the manifest that only calibrated artifacts have; see ``lowvram.calibrate``."""


class Component:
    """One component's file with what the manifest says of it."""

    def __init__(self, path: Path, facts: dict[str, Any]):
        self.path, self.facts = path, facts
        self.config: dict[str, Any] = facts["config"]
        self.read_bytes = 0
        """Of slabs, read from the file so far; those that are held are read once."""
        self._held: dict[str, Tensor] = {}
        header, self._data_offset = read_header(path)
        header.pop("__metadata__", None)
        ordered = {name for name in facts["tensors"] if self.tensor_channels_last(name)}
        self._slabs = {slab.name: slab for slab in _slabs_of(path, header, facts["slabs"], ordered)}

    @property
    def precision(self) -> str:
        return str(self.facts["precision"])

    @property
    def slab_names(self) -> list[str]:
        return list(self._slabs)

    @property
    def tensor_names(self) -> list[str]:
        return [spec.name for slab in self._slabs for spec in self.slab_specs(slab)]

    @property
    def quantized_names(self) -> list[str]:
        """Weights (by the model's name) that are not kept in a floating-point dtype."""
        return [name for name in self.facts["tensors"] if self.tensor_scheme(name) not in ("bf16", "fp32")]

    def slab_specs(self, slab: str) -> list[TensorSpec]:
        """Tensors of a slab without its padding."""
        return [spec for spec in self._slab(slab).tensors if not spec.name.startswith(PAD)]

    def slab_nbytes(self, slab: str) -> int:
        return self._slab(slab).nbytes

    def tensor_scheme(self, name: str) -> str:
        """Scheme of a tensor: "int8", "fp8", "int8_weight_only", ..., or the dtype it is kept in."""
        return str(self.facts["tensors"].get(name, {}).get("scheme", "kept"))

    def tensor_group(self, name: str) -> int:
        """How many neighbouring input channels of a weight were rotated together before it was quantized; 1: none."""
        return int(self.facts["tensors"].get(name, {}).get("rotated_group", 1))

    def tensor_smoothed(self, name: str) -> bool:
        """Whether a weight was divided by factors, by which its inputs are multiplied."""
        return bool(self.facts["tensors"].get(name, {}).get("smoothed", False))

    def tensor_channels_last(self, name: str) -> bool:
        """Whether a convolution's weight lies in the order in which it is computed with."""
        return bool(self.facts["tensors"].get(name, {}).get("channels_last", False))

    def read_slab(self, slab: str, out: Tensor | None = None) -> Tensor:
        """A slab as uint8 [nbytes]: mapped from the file or as it is held, or copied to ``out`` (on any device) if that
        is given."""
        source = self._held.get(slab)
        if source is None:
            source = self._mapped(slab)
            self.read_bytes += source.numel()
        return source if out is None else out[: source.numel()].copy_(source)

    def hold(self, slab: str, *, copied: bool) -> None:
        """Have a slab at hand from now on, so that nothing is read from the file for it again: ``copied`` to memory of
        this process, or mapped, where that is what is computed with."""
        if slab not in self._held:
            mapped = self.read_slab(slab)
            self._held[slab] = mapped.clone() if copied else mapped

    def views(self, slab: str, buffer: Tensor) -> dict[str, Tensor]:
        """The tensors of a slab as views of ``buffer``, which holds the slab's bytes on any device."""
        return {spec.name: _view(buffer, spec) for spec in self.slab_specs(slab)}

    def verify(self) -> None:
        """Raises: CheckpointError naming the file and the slab whose bytes are not those that were written."""
        stretches = [("header", 0, self._data_offset, self.facts["header_sha256"])]
        for entry in self.facts["slabs"]:
            slab = self._slab(entry["name"])
            stretches.append((f"slab {slab.name}", self._data_offset + slab.offset, slab.nbytes, entry["sha256"]))
        for what, offset, nbytes, expected in stretches:
            got = sha256_range(self.path, offset, nbytes)
            if got != expected:
                raise CheckpointError(
                    f"{self.path}: {what} has checksum {got[:16]}, the manifest says {expected[:16]}: bytes have "
                    "changed since it was written; convert the checkpoint again"
                )

    @functools.cached_property
    def _mapping(self) -> Tensor:
        # A mapping that can only be read: it takes no memory of its own, so the system grants it at any size.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given (NumPy array|buffer) is not writable", UserWarning)
            return torch.from_numpy(np.memmap(self.path, np.uint8, mode="r"))

    def _mapped(self, slab: str) -> Tensor:
        found = self._slab(slab)
        return self._mapping[self._data_offset + found.offset :][: found.nbytes]

    def _slab(self, name: str) -> Slab:
        if name not in self._slabs:
            raise CheckpointError(f"{self.path} has no slab {name}; it has {', '.join(self._slabs)}")
        return self._slabs[name]


def _view(buffer: Tensor, spec: TensorSpec) -> Tensor:
    stored = buffer[spec.offset : spec.offset + spec.nbytes].view(spec.dtype).view(spec.stored_shape)
    return stored.movedim(-1, 1) if spec.channels_last else stored


def _slabs_of(
    path: Path, header: dict[str, Any], entries: list[dict[str, Any]], channels_last: set[str]
) -> Iterator[Slab]:
    tensors = sorted(((e["data_offsets"][0], name, e) for name, e in header.items()), reverse=True)
    for entry in entries:
        begin, end = entry["offset"], entry["offset"] + entry["nbytes"]
        specs = []
        while tensors and tensors[-1][0] < end:
            offset, name, facts = tensors.pop()
            specs.append(_spec(path, name, facts, offset - begin, channels_last=name in channels_last))
        yield Slab(name=entry["name"], offset=begin, nbytes=entry["nbytes"], tensors=tuple(specs))


def _spec(path: Path, name: str, facts: dict[str, Any], offset: int, *, channels_last: bool) -> TensorSpec:
    if facts["dtype"] not in DTYPES:
        raise CheckpointError(f"{path}: {name} has dtype {facts['dtype']}; known are {', '.join(DTYPES)}")
    dtype, shape = DTYPES[facts["dtype"]], tuple(facts["shape"])
    if channels_last:
        if len(shape) not in (4, 5):
            raise CheckpointError(
                f"{path}: {name} of {len(shape)} dimensions would lie channels-last; expected the 4 or 5 of a "
                "convolution's weight: convert again"
            )
        shape = (shape[0], shape[-1], *shape[1:-1])
    return TensorSpec(name=name, dtype=dtype, shape=shape, offset=offset, channels_last=channels_last)


def of_weights(manifest: dict[str, Any]) -> dict[str, Any]:
    """What a manifest says of the artifact itself: nothing of what was measured on it."""
    return {key: value for key, value in manifest.items() if key != CALIBRATION}


class Artifact:
    """A finished artifact; see ``open``."""

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path, self.manifest = path, manifest
        self._file_bytes = 0
        self._held: dict[str, dict[str, Tensor]] = {}

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = False) -> Artifact:
        """Read an artifact's manifest and check that its files are there and as long as they should be.

        Args:
            path: the folder.
            verify: also read every byte and compare the checksums.

        Raises:
            CheckpointError: no artifact, an unknown format version, a missing or short file, a changed byte.
        """
        path = Path(path)
        artifact = cls(path, _read_manifest(path))
        for name in artifact.manifest["components"]:
            artifact.component(name)
        for name, facts in artifact.manifest["files"].items():
            if not (path / name).is_file() or (path / name).stat().st_size != facts["bytes"]:
                raise CheckpointError(f"{path / name} is missing or not {facts['bytes']} bytes long; convert again")
        if verify:
            artifact.verify()
        return artifact

    def check_unchanged(self) -> None:
        """Raises: CheckpointError where another artifact has taken the folder since this one was opened."""
        if of_weights(_read_manifest(self.path)) != of_weights(self.manifest):
            raise CheckpointError(f"{self.path} was replaced by another artifact while it was opened; run again")

    @property
    def shape_values(self) -> str | None:
        """What a shape artifact has in place of trained values; None for a converted checkpoint."""
        # The manifest's key for what has shapes and no trained weights behind them.
        facts = self.manifest.get("phantom")
        return None if facts is None else str(facts["values"])

    def component(self, name: str) -> Component:
        """Raises: CheckpointError where the artifact was made without this component."""
        if name not in self._components:
            raise CheckpointError(
                f"{self.path} has no {name}; it has {', '.join(self._components)}: convert the checkpoint as a whole"
            )
        return self._components[name]

    @property
    def read_bytes(self) -> int:
        """Of weights, read from its files so far."""
        return self._file_bytes + sum(component.read_bytes for component in self._components.values())

    def read_tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a safetensors file beside the components, as "audio_encoder/model.safetensors".

        Raises:
            OSError, SafetensorError: missing, or damaged.
        """
        if name in self._held:
            return self._held[name]
        tensors = load_file(self.path / name)
        self._file_bytes += sum(tensor.nbytes for tensor in tensors.values())
        return tensors

    def hold_tensors(self, name: str) -> None:
        """Have the file's tensors in memory from now on."""
        self._held[name] = self.read_tensors(name)

    def precisions(self) -> dict[str, str]:
        """Component -> precision it was converted to."""
        return {name: str(facts["precision"]) for name, facts in self.manifest["components"].items()}

    def verify(self) -> None:
        """Raises: CheckpointError naming the first file whose bytes are not those that were written."""
        if self.shape_values is not None:
            raise CheckpointError(
                f"{self.path} is a shape artifact ({self.shape_values}): it has the shapes of a model, no checksums "
                "and nothing to verify; convert a checkpoint for an artifact that can be verified"
            )
        for component in self._components.values():
            component.verify()
        for name, facts in self.manifest["files"].items():
            if sha256_file(self.path / name) != facts["sha256"]:
                raise CheckpointError(f"{self.path / name} has changed since it was written; convert again")

    @functools.cached_property
    def _components(self) -> dict[str, Component]:
        facts = self.manifest["components"]
        return {name: Component(self.path / entry["file"], entry) for name, entry in facts.items()}


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        there = file.is_file()
    except (OSError, ValueError):  # a folder that may not be looked into, a name that no file can have
        there = False
    if not there:
        from lowvram_quantize.no_artifact import why_no_artifact  # which reads with this module

        raise CheckpointError(why_no_artifact(path))
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}; convert again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{file} does not say format {FORMAT!r}; make an artifact with lowvram convert")
    version = manifest.get("format_version")
    if type(version) is not int or version not in LARGEST_GROUPS:
        raise CheckpointError(
            f"{file} has format version {version!r}; this lowvram reads {FORMAT_VERSION} to {max(LARGEST_GROUPS)}: "
            "convert again, or use the lowvram that wrote it"
        )
    check_manifest(
        file,
        manifest,
        LARGEST_GROUPS[version],
        smoothed=version >= SMOOTHED_VERSION,
        channels_last=version >= CHANNELS_LAST_VERSION,
    )
    return manifest
