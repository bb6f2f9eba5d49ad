"""Original: the DiT's weights as they were before an artifact stored them in fewer bits, read tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lowvram_kernels.errors import CheckpointError
from lowvram_quantize.activations import Measured
from lowvram_quantize.asked import lora_sources
from lowvram_quantize.checkpoint import Checkpoint, Named
from lowvram_quantize.components import ComponentPlan, plan_dit
from lowvram_quantize.format import Artifact
from lowvram_quantize.lora import LoraSource
from lowvram_quantize.schemes import all_finite, not_finite
from lowvram_quantize.slabs import sha256_file
from lowvram_quantize.smoothing import factors_of
from lowvram_quantize.store import merged_chunks
from lowvram_quantize.units import Int8

Tensor = torch.Tensor
_REPLACE = "give what it was made from, or convert it anew with --overwrite"


class Original:
    """Tensors of the DiT that ``plan`` converts, in full precision and with its LoRAs merged. Nothing is kept."""

    def __init__(self, plan: ComponentPlan):
        self.plan = plan
        self._items = {item.name: item for item in plan.items}
        self._factors: tuple[str, dict[str, Tensor]] = ("", {})  # of a slab

    def int8(self, name: str) -> tuple[int, Tensor | None]:
        """How ``convert`` prepares this weight for int8: how many input channels it rotates together, and the factors
        [K] that it divides them by before; None where it does not. Of a plan in int8."""
        item = self._items[name]
        if not item.scheme.smooth:
            return item.scheme.group, None
        if self._factors[0] != item.slab:
            own = [each for each in self.plan.items if each.slab == item.slab]
            self._factors = item.slab, factors_of(self.plan, own)
        return item.scheme.group, self._factors[1][name]

    def merged(self, name: str) -> Tensor:
        """The tensor called ``name`` in the artifact: float32, in its own shape.

        Raises:
            CheckpointError: there is none, it cannot be read, or holds NaN or infinity.
        """
        if name not in self._items:
            raise CheckpointError(f"the checkpoint has no {name}; expected the one that the artifact was made from")
        item = self._items[name]
        out, row = torch.empty(item.ref.shape), 0
        rows = out.view(item.ref.rows, -1)
        for chunk in merged_chunks(item, self.plan.deltas.get(name), float32=True):
            rows[row : row + len(chunk)] = chunk
            row += len(chunk)
        if not all_finite(out):
            raise not_finite(name)
        return out

    def check(self, artifact: Artifact) -> None:
        """Read the DiT's files and the LoRAs, and compare them with what the artifact says that it was made from.

        Raises:
            CheckpointError: it was made from something else, or has no DiT.
        """
        if artifact.component("dit").config != self.plan.config:
            raise CheckpointError(f"{artifact.path} holds a DiT of another configuration than the source; {_REPLACE}")
        mine = [lora.summary() for lora in self.plan.loras]
        keys = ("file", "weight", "alphas", "ranks", "merged", "replaced")
        merged = artifact.manifest.get("loras", [artifact.manifest["lora"]] if artifact.manifest["lora"] else [])
        theirs = [{key: lora.get(key) for key in keys} for lora in merged]
        if [{key: lora[key] for key in keys} for lora in mine] != theirs:
            names = ", ".join(f"{lora['file']} (weight {lora['weight'] or 1:g})" for lora in theirs) or "none"
            raise CheckpointError(f"{artifact.path} was made with other LoRAs than were given: {names}; {_REPLACE}")
        known = {(Path(each["file"]).name, each["bytes"], each["sha256"]) for each in artifact.manifest["sources"]}
        sizes = {(name, nbytes) for name, nbytes, _ in known}
        for file in self.plan.source_files:
            nbytes = file.stat().st_size
            if (file.name, nbytes) not in sizes or (file.name, nbytes, sha256_file(file)) not in known:
                raise CheckpointError(f"{artifact.path} was not made from {file} as it is now; {_REPLACE}")


def original_of(
    ckpt_dir: str | Path | None,
    *,
    named: Named | None = None,
    lora: str | Path | Sequence[str | Path | LoraSource] | None = None,
    lora_alpha: float | None = None,
    rotate: bool | int | None = None,
    smooth: bool | None = None,
    activations: str | Path | None = None,
) -> Original:
    """What ``convert`` reads the DiT from; ``named`` are files that go before ``ckpt_dir``'s, ``rotate``, ``smooth``
    and ``activations`` as there.

    Raises:
        CheckpointError, ConfigError: as of ``convert``.
    """
    checkpoint = Checkpoint(None if ckpt_dir is None else Path(ckpt_dir), named or Named())
    file = checkpoint.file("dit")
    loras, measured = lora_sources(lora, lora_alpha), Measured.of(activations)
    int8 = Int8.of(rotate, smooth, measured=measured.given)
    return Original(
        plan_dit(
            file, checkpoint.config(file), "int8", loras, group=int8.group, smooth=int8.smooth, activations=measured
        )
    )


def original_as(options: Mapping[str, Any]) -> Original:
    """The same of ``convert``'s options by their names."""
    parts = ("dit_file", "vae_file", "text_encoder_file", "audio_encoder_dir", "tokenizer_dir")
    named = Named.of(*(options[part] for part in parts))
    taken = {name: options[name] for name in ("lora", "lora_alpha", "rotate", "smooth", "activations")}
    return original_of(options["ckpt_dir"], named=named, **taken)
