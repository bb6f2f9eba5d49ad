"""Text encoder, audio encoder and VAE from an artifact: real libraries' models under our loading."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from lowvram_kernels.errors import CheckpointError
from lowvram_models.vae import StreamingVAE, build_vae
from lowvram_quantize.format import Artifact

from lowvram.weights import load_slabs, swap_quantized

log = logging.getLogger(__name__)


def load_vae(artifact: Artifact, device: torch.device, dtype: torch.dtype) -> StreamingVAE:
    """The VAE with its convolutions' weights as stored: dequantized at use where they are 8-bit."""
    component = artifact.component("vae")
    with torch.device("meta"):
        model = build_vae(component.config["base_dim"])
    swap_quantized(model, component)
    load_slabs(model, component, device, dtype)
    return StreamingVAE(model.eval().requires_grad_(False), dtype=dtype)


def read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}; convert the checkpoint again") from error
