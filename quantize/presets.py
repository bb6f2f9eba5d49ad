"""Shapes of whole models by name, for those who have no checkpoint at hand."""

from __future__ import annotations

import dataclasses
from typing import Any

from lowvram_models.constants import LATENT_CHANNELS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """``dit`` as the published ``config.json`` has it, ``text_encoder`` as ``build_umt5`` takes it, ``audio_encoder``
    as ``wav2vec2_model`` takes it."""

    dit: dict[str, Any]
    text_encoder: dict[str, int]
    vae_base_dim: int
    audio_encoder: dict[str, Any]


def dit_config(settings: dict[str, Any]) -> dict[str, Any]:
    """The published ``config.json`` with other widths; it leaves text_dim out where that is the default 4096."""
    return {
        "_class_name": "WanModel_S2V", "_diffusers_version": "0.34.0", "model_type": "s2v",
        "in_dim": LATENT_CHANNELS, "out_dim": LATENT_CHANNELS, "cond_dim": LATENT_CHANNELS, "eps": 1e-6,
        "num_audio_token": 4, "enable_adain": True, "adain_mode": "attn_norm", "zero_init": True,
        "zero_timestep": True, "enable_motioner": False, "add_last_motion": True, "enable_tsm": False,
        "trainable_token_pos_emb": False, "motion_token_num": 1024, "enable_framepack": True,
        "framepack_drop_mode": "padd",
    } | settings  # fmt: skip


# Wan2.2-S2V-14B with UMT5-XXL, Wan 2.1's VAE and wav2vec2-large-xlsr-53 (model-spec section 1).
PUBLISHED = Preset(
    dit=dit_config(
        {
            "dim": 5120,
            "ffn_dim": 13824,
            "num_heads": 40,
            "num_layers": 40,
            "freq_dim": 256,
            "text_len": 512,
            "audio_dim": 1024,
            "audio_inject_layers": [0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39],
            "cross_attn_type": "t2v_cross_attn",
        }
    ),
    text_encoder={
        "vocab_size": 256384,
        "d_model": 4096,
        "d_ff": 10240,
        "num_heads": 64,
        "d_kv": 64,
        "num_layers": 24,
    },
    vae_base_dim=96,
    audio_encoder={
        "width": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "conv_dim": (512,) * 7,
        "num_conv_pos_embeddings": 128,
        "num_conv_pos_embedding_groups": 16,
    },
)

# The smallest that every step runs on.
TINY = Preset(
    dit=dit_config(
        {
            "dim": 80,
            "ffn_dim": 216,
            "num_heads": 5,
            "num_layers": 4,
            "freq_dim": 32,
            "text_len": 48,
            "text_dim": 32,
            "audio_dim": 24,
            "audio_inject_layers": [0, 2],
        }
    ),
    text_encoder={"vocab_size": 256, "d_model": 32, "d_ff": 64, "num_heads": 4, "d_kv": 8, "num_layers": 3},
    vae_base_dim=8,
    audio_encoder={"width": 24},
)

PRESETS = {"14b": PUBLISHED, "tiny": TINY}
