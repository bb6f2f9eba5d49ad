"""Names of published tensors in the libraries' modules, and the part of the DiT that a tensor belongs to.

Source: model-spec section 6. The DiT's own names are the published ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_T5_OUTSIDE = {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}
_T5_IN_BLOCK = {
    "norm1.weight": "layer.0.layer_norm.weight",
    "attn.q.weight": "layer.0.SelfAttention.q.weight",
    "attn.k.weight": "layer.0.SelfAttention.k.weight",
    "attn.v.weight": "layer.0.SelfAttention.v.weight",
    "attn.o.weight": "layer.0.SelfAttention.o.weight",
    "pos_embedding.embedding.weight": "layer.0.SelfAttention.relative_attention_bias.weight",
    "norm2.weight": "layer.1.layer_norm.weight",
    "ffn.gate.0.weight": "layer.1.DenseReluDense.wi_0.weight",
    "ffn.fc1.weight": "layer.1.DenseReluDense.wi_1.weight",
    "ffn.fc2.weight": "layer.1.DenseReluDense.wo.weight",
}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_INJECTOR = re.compile(r"audio_injector\.(?:injector|injector_adain_layers)\.(\d+)\.")

SHARED = "shared"
START = "start"
DECODER = ("decoder.", "post_quant_conv.")
"""How names begin of what the VAE's decoder needs; it is no slab of its own."""
_AT_START = re.compile(r"(time_embedding|time_projection|text_embedding)\.")


def umt5_name(published: str) -> str | None:
    """Name in transformers' ``UMT5EncoderModel``; None for a name that the published encoder does not have.

    The embedding comes under ``shared.weight`` only; the model also knows it as ``encoder.embed_tokens.weight``.
    """
    if published in _T5_OUTSIDE:
        return _T5_OUTSIDE[published]
    match = _BLOCK.fullmatch(published)
    inside = _T5_IN_BLOCK.get(match[2]) if match else None
    return f"encoder.block.{match[1]}.{inside}" if match and inside else None


def vae_names(published: Iterable[str]) -> dict[str, str]:
    """Published name -> name in diffusers' ``AutoencoderKLWan``; unknown names come through as they are."""
    # Two seconds to import, and of most components no name is asked for.
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    # The library's conversion moves values without looking at them, so names can travel in their place.
    renamed = convert_wan_vae_to_diffusers({name: name for name in published})
    return {old: new for new, old in renamed.items()}


def dit_slab(name: str, audio_inject_layers: Sequence[int]) -> str:
    """``layer.{i}`` for what layer i alone needs, its audio injection included; ``start`` for what is needed once a
    video, to set it up; ``shared`` for everything else."""
    if match := _BLOCK.match(name):
        return f"layer.{match[1]}"
    match = _INJECTOR.match(name)
    if match and int(match[1]) < len(audio_inject_layers):
        return f"layer.{audio_inject_layers[int(match[1])]}"
    return START if _AT_START.match(name) else SHARED


def umt5_slab(name: str) -> str:
    """``block.{i}`` for what block i of the text encoder needs, ``shared`` for the rest; takes module names."""
    match = re.match(r"encoder\.block\.(\d+)\.", name)
    return f"block.{match[1]}" if match else SHARED
