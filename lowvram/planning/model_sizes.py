"""Sizes of a model's parts, from its artifact's headers; values are not read."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable

import torch

from lowvram_kernels.errors import CheckpointError
from lowvram_models.config import DiTConfig
from lowvram_models.names import DECODER
from lowvram_quantize.format import Artifact, Component
from lowvram_quantize.slabs import read_header

EIGHT_BIT = ("int8", "fp8")
# What the DiT's Linears run over: a block's tokens, the text's, a block's tokens of audio, its latent frames.
_RUNS_OVER = {
    "text": re.compile(r"blocks\.\d+\.cross_attn\.[kv]\.weight"),
    "audio": re.compile(r"audio_injector\.injector\.\d+\.[kv]\.weight"),
    "frames": re.compile(r"audio_injector\.injector_adain_layers\.\d+\.linear\.weight"),
    "block": re.compile(
        r"blocks\.\d+\.(self_attn\.[qkvo]|cross_attn\.[qo]|ffn\.[02])\.weight|audio_injector\.injector\.\d+\.[qo]\.weight"
    ),
}
_NOT_A_PARAMETER = ("_scale", "._scale", ".absmax")
# What is used as it is stored, whatever is computed in: weights in 8 and 4 bit, and scales that their kernels take.
_AS_STORED = (torch.int8, torch.float8_e4m3fn, torch.uint8)
_SCALES_AS_STORED = ("weight_scale", ".absmax")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlabSizes:
    """A slab of ``nbytes``: whether a part of it is used ``as_stored`` whatever is computed in, and how many values of
    the others it has in bfloat16 and in float32."""

    nbytes: int
    as_stored: bool
    bf16_values: int
    fp32_values: int

    def copies(self, dtype: torch.dtype) -> int:
        """Bytes of the copies that are made of it where ``dtype`` is computed in."""
        other = self.fp32_values if dtype is torch.bfloat16 else self.bf16_values
        return other * dtype.itemsize

    def bound(self, dtype: torch.dtype) -> int:
        """Bytes that it takes once it is bound. Where everything was copied nobody holds the slab any more."""
        same = self.bf16_values if dtype is torch.bfloat16 else self.fp32_values
        return self.copies(dtype) + (self.nbytes if self.as_stored or same else 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearSizes:
    """How many weights the DiT's Linears have that are stored as ``scheme`` and run over rows of a kind: "block",
    "text", "audio" or "frames"."""

    scheme: str
    rows: str
    weights: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class AudioSizes:
    """wav2vec2's shapes: all that its workspace depends on."""

    parameters: int
    width: int
    layers: int
    heads: int
    conv_channels: int
    conv_stride: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """Sizes of the artifact's slabs; ``parameters`` are counts.

    ``layers`` has each layer's slab; ``start`` goes before the first block. ``vae_decoder`` has how many values each
    tensor of the VAE's decoder has, and is empty where none of its weights is in 8 bit. ``precision`` is the DiT's,
    which may be "mixed"; ``linears`` say of what.
    """

    config: DiTConfig
    precision: str
    linears: tuple[LinearSizes, ...]
    layers: tuple[SlabSizes, ...]
    shared: SlabSizes
    start: SlabSizes
    parameters: int
    text: tuple[SlabSizes, ...]
    text_parameters: int
    text_width: int
    text_ffn: int
    text_heads: int
    vae: tuple[SlabSizes, ...]
    vae_decoder: tuple[int, ...]
    vae_base_dim: int
    vae_parameters: int
    audio: AudioSizes

    @property
    def weight_bytes(self) -> int:
        """The DiT's, wherever they lie."""
        return self.start.nbytes + self.shared.nbytes + sum(self.layer_bytes)

    @functools.cached_property
    def layer_bytes(self) -> tuple[int, ...]:
        """Of each layer's slab, as it is stored."""
        return tuple(slab.nbytes for slab in self.layers)

    @property
    def text_bytes(self) -> int:
        """Of the text encoder, as it is stored."""
        return sum(slab.nbytes for slab in self.text)

    @property
    def vae_bytes(self) -> int:
        """Of the VAE, as it is stored."""
        return sum(slab.nbytes for slab in self.vae)

    @functools.cached_property
    def schemes(self) -> frozenset[str]:
        """Of the DiT's Linears."""
        return frozenset(linears.scheme for linears in self.linears)

    @property
    def quantized(self) -> bool:
        """Whether any of the DiT's Linears takes 8-bit activations."""
        return not self.schemes.isdisjoint(EIGHT_BIT)


def model_sizes(artifact: Artifact) -> ModelSizes:
    """Read an artifact's sizes.

    Raises:
        CheckpointError: a component is missing or its configuration cannot be used.
    """
    dit, text, vae = (artifact.component(name) for name in ("dit", "text_encoder", "vae"))
    try:
        config = DiTConfig.from_dict(dit.config)
    except ValueError as error:
        raise CheckpointError(f"the artifact's DiT configuration cannot be used: {error}") from error
    return ModelSizes(
        config=config,
        precision=dit.precision,
        linears=_linears(dit),
        layers=_slabs(dit, (f"layer.{index}" for index in range(config.num_layers))),
        shared=_slab(dit, "shared"),
        start=_slab(dit, "start"),
        parameters=_parameters(dit),
        text=_slabs(text, text.slab_names),
        text_parameters=_parameters(text),
        text_width=int(text.config["d_model"]),
        text_ffn=int(text.config["d_ff"]),
        text_heads=int(text.config["num_heads"]),
        vae=_slabs(vae, vae.slab_names),
        vae_decoder=_narrow_decoder(vae),
        vae_base_dim=int(vae.config["base_dim"]),
        vae_parameters=_parameters(vae),
        audio=_audio_sizes(artifact),
    )


def _linears(component: Component) -> tuple[LinearSizes, ...]:
    weights: Counter[tuple[str, str]] = Counter()
    for slab in component.slab_names:
        for spec in component.slab_specs(slab):
            for rows, pattern in _RUNS_OVER.items():
                if pattern.fullmatch(spec.name):
                    weights[component.tensor_scheme(spec.name), rows] += math.prod(spec.shape)
    return tuple(LinearSizes(scheme=s, rows=rows, weights=count) for (s, rows), count in sorted(weights.items()))


def _slabs(component: Component, names: Iterable[str]) -> tuple[SlabSizes, ...]:
    return tuple(_slab(component, name) for name in names)


def _slab(component: Component, name: str) -> SlabSizes:
    specs = component.slab_specs(name)
    values = [spec for spec in specs if spec.dtype not in _AS_STORED and not spec.name.endswith(_SCALES_AS_STORED)]
    counts = [sum(math.prod(s.shape) for s in values if s.dtype is dtype) for dtype in (torch.bfloat16, torch.float32)]
    return SlabSizes(
        nbytes=component.slab_nbytes(name),
        as_stored=len(values) < len(specs),
        bf16_values=counts[0],
        fp32_values=counts[1],
    )


def _narrow_decoder(component: Component) -> tuple[int, ...]:
    specs = [spec for slab in component.slab_names for spec in component.slab_specs(slab)]
    own = [spec for spec in specs if spec.name.startswith(DECODER) and not spec.name.endswith(_NOT_A_PARAMETER)]
    return tuple(math.prod(spec.shape) for spec in own) if any(spec.dtype in _AS_STORED for spec in own) else ()


def _parameters(component: Component) -> int:
    total = 0
    for slab in component.slab_names:
        for spec in component.slab_specs(slab):
            packed = 2 if component.tensor_scheme(spec.name) == "nf4" else 1
            total += 0 if spec.name.endswith(_NOT_A_PARAMETER) else packed * math.prod(spec.shape)
    return total


def _audio_sizes(artifact: Artifact) -> AudioSizes:
    folder = artifact.path / "audio_encoder"
    header, _ = read_header(folder / "model.safetensors")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return AudioSizes(
            parameters=sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__"),
            width=int(config["hidden_size"]),
            layers=int(config["num_hidden_layers"]),
            heads=int(config["num_attention_heads"]),
            conv_channels=int(config["conv_dim"][0]),
            conv_stride=int(config["conv_stride"][0]),
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be used: {error!r}; convert again") from error
