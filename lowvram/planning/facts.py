"""What an artifact's headers say about the sizes of its parts; values are not read."""

from __future__ import annotations

import dataclasses
import json
import math

from lowvram_kernels.errors import CheckpointError
from lowvram_models.config import DiTConfig
from lowvram_quantize.format import Artifact, Component, read_header

EIGHT_BIT = ("int8", "fp8")
_NOT_A_PARAMETER = ("_scale", "._scale", ".absmax")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AudioFacts:
    """wav2vec2's shapes: all that its workspace depends on."""

    parameters: int
    width: int
    layers: int
    heads: int
    conv_channels: int
    conv_stride: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Sizes in bytes, as the artifact's slabs have them; ``parameters`` are counts.

    ``layer_bytes`` has each layer's slab; ``start_bytes`` go before the first block. ``precision`` is the DiT's.
    """

    config: DiTConfig
    precision: str
    layer_bytes: tuple[int, ...]
    shared_bytes: int
    start_bytes: int
    parameters: int
    text_bytes: int
    text_parameters: int
    text_width: int
    text_ffn: int
    text_heads: int
    vae_bytes: int
    vae_base_dim: int
    vae_parameters: int
    audio: AudioFacts

    @property
    def weight_bytes(self) -> int:
        """The DiT's, wherever they lie."""
        return self.start_bytes + self.shared_bytes + sum(self.layer_bytes)

    @property
    def quantized(self) -> bool:
        return self.precision in EIGHT_BIT


def facts_of(artifact: Artifact) -> ModelFacts:
    """Read an artifact's sizes.

    Raises:
        CheckpointError: a component is missing or its configuration cannot be used.
    """
    dit, text, vae = (artifact.component(name) for name in ("dit", "text_encoder", "vae"))
    try:
        config = DiTConfig.from_dict(dit.config)
    except ValueError as error:
        raise CheckpointError(f"the artifact's DiT configuration cannot be used: {error}") from error
    return ModelFacts(
        config=config,
        precision=dit.precision,
        layer_bytes=tuple(dit.slab_nbytes(f"layer.{index}") for index in range(config.num_layers)),
        shared_bytes=dit.slab_nbytes("shared"),
        start_bytes=dit.slab_nbytes("start"),
        parameters=_parameters(dit),
        text_bytes=sum(text.slab_nbytes(slab) for slab in text.slab_names),
        text_parameters=_parameters(text),
        text_width=int(text.config["d_model"]),
        text_ffn=int(text.config["d_ff"]),
        text_heads=int(text.config["num_heads"]),
        vae_bytes=sum(vae.slab_nbytes(slab) for slab in vae.slab_names),
        vae_base_dim=int(vae.config["base_dim"]),
        vae_parameters=_parameters(vae),
        audio=_audio_facts(artifact),
    )


def _parameters(component: Component) -> int:
    total = 0
    for slab in component.slab_names:
        for spec in component.slab_specs(slab):
            packed = 2 if component.tensor_scheme(spec.name) == "nf4" else 1
            total += 0 if spec.name.endswith(_NOT_A_PARAMETER) else packed * math.prod(spec.shape)
    return total


def _audio_facts(artifact: Artifact) -> AudioFacts:
    folder = artifact.path / "audio_encoder"
    header, _ = read_header(folder / "model.safetensors")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return AudioFacts(
            parameters=sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__"),
            width=int(config["hidden_size"]),
            layers=int(config["num_hidden_layers"]),
            heads=int(config["num_attention_heads"]),
            conv_channels=int(config["conv_dim"][0]),
            conv_stride=int(config["conv_stride"][0]),
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be used: {error!r}; convert again") from error
