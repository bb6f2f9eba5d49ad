"""Audio inside the DiT: causal encoder of wav2vec2 features, and their injection into the blocks.

Source: model-spec section 4 (LiveAvatar, ``causal_audio_encoder`` and ``auxi_blocks``).
Shapes: A actors, F latent frames, D width, T tokens a latent frame.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lowvram_models.attention import CrossAttention
from lowvram_models.config import DiTConfig
from lowvram_models.constants import MOTION_FRAMES, MOTION_LATENTS

Tensor = torch.Tensor

# Each block sees its own audio only, behind this many copies of its first video frame: they stand for the motion
# frames, and the tokens that come of them are dropped.
ADAIN_EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class AudioTokens:
    """What a block hears: ``frame`` [A, F, 5, D] for cross-attention, ``clip`` [A, F, D] for the modulation.

    ``derived`` has what layers made of them, so that they make it once for all steps; None where the tensors will hold
    another block's values.
    """

    frame: Tensor
    clip: Tensor
    derived: dict[Any, Any] | None = dataclasses.field(default=None, compare=False, repr=False)


class CausalConv1d(nn.Module):
    """Conv1d over [..., channels, time] that sees the past only: replicate padding of kernel - 1 on the left."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv1d(in_channels, out_channels, 3, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (2, 0), mode="replicate"))


class MotionEncoder(nn.Module):
    """Two branches of causal convolutions that take video frames to latent frames (a quarter as many)."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.conv1_local = CausalConv1d(in_dim, dim)
        self.conv1_global = CausalConv1d(in_dim, dim // 4)
        self.conv2 = CausalConv1d(dim // 4, dim // 2, stride=2)
        self.conv3 = CausalConv1d(dim // 2, dim, stride=2)
        self.final_linear = nn.Linear(dim, dim)
        self.padding_tokens = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x_ACT: Tensor) -> tuple[Tensor, Tensor]:
        """[A, C, video frames] -> (local [A, F, 5, D], global [A, F, D])."""
        quarters = self.conv1_local(x_ACT).unflatten(1, (4, -1)).flatten(0, 1)
        local = self._shared(quarters).unflatten(0, (-1, 4)).transpose(1, 2)
        padding = self.padding_tokens.to(local.dtype).expand(*local.shape[:2], 1, -1)
        clip = self.final_linear(self._shared(self.conv1_global(x_ACT)))
        return torch.cat([local, padding], dim=2), clip

    def _shared(self, x: Tensor) -> Tensor:
        for conv in (None, self.conv2, self.conv3):
            x = x if conv is None else conv(x)
            x = F.silu(F.layer_norm(x.transpose(1, 2), (x.shape[1],), eps=1e-6)).transpose(1, 2)
        return x.transpose(1, 2)


class AudioEncoder(nn.Module):
    """Weighted mean over wav2vec2's hidden states, then the motion encoder."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.weights = nn.Parameter(torch.ones(1, config.audio_layers, 1, 1))
        self.encoder = MotionEncoder(config.audio_dim, config.dim)

    def forward(self, audio_ASCT: Tensor) -> AudioTokens:
        """[A, 25, audio_dim, 4 F] of one block -> its tokens."""
        if audio_ASCT.ndim != 4 or audio_ASCT.shape[-1] % 4:
            raise ValueError(f"audio has shape {tuple(audio_ASCT.shape)}; expected [actors, 25, audio_dim, 4 * frames]")
        lead = audio_ASCT[..., :1].expand(*audio_ASCT.shape[:-1], MOTION_FRAMES)
        weight = F.silu(self.weights.to(audio_ASCT.dtype))
        mean = (torch.cat([lead, audio_ASCT], dim=-1) * (weight / weight.sum(dim=1, keepdim=True))).sum(dim=1)
        local, clip = self.encoder(mean)
        return AudioTokens(local[:, MOTION_LATENTS:], clip[:, MOTION_LATENTS:])


class AdaLayerNorm(nn.Module):
    """``LN(x) * (1 + scale) + shift`` with (shift, scale) from a condition of each latent frame."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, 2 * dim)

    def forward(self, x_FTD: Tensor, condition_FD: Tensor) -> Tensor:
        shift, scale = self.modulation(condition_FD)
        x = F.layer_norm(x_FTD.float(), (x_FTD.shape[-1],), eps=ADAIN_EPS)
        return x * (1 + scale[:, None]) + shift[:, None]

    def modulation(self, condition_FD: Tensor) -> tuple[Tensor, Tensor]:
        """(shift, scale) float32 [F, D]."""
        shift, scale = self.linear(F.silu(condition_FD)).float().chunk(2, dim=-1)
        return shift, scale


class AudioInjector(nn.Module):
    """Adds to each latent frame what it hears; one attention and one norm for each entry of audio_inject_layers."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        count = len(config.audio_inject_layers)
        self.injector = nn.ModuleList(CrossAttention(config.dim, config.num_heads, config.eps) for _ in range(count))
        self.injector_adain_layers = nn.ModuleList(AdaLayerNorm(config.dim) for _ in range(count))

    def forward(self, x_LD: Tensor, audio: AudioTokens, masks_AFT1: Tensor | None, index: int) -> Tensor:
        """[L, D] float32 -> the same with what is heard added. ``masks`` [A, F, T, 1] weigh the actors; None means one
        actor everywhere."""
        x_FTD = x_LD.unflatten(0, (audio.frame.shape[1], -1))
        attention, norm = self.injector[index], self.injector_adain_layers[index]
        residual = torch.zeros_like(x_FTD)
        for actor in range(audio.frame.shape[0]):
            heard = attention(norm(x_FTD, audio.clip[actor]).to(audio.frame.dtype), audio.frame[actor])
            residual += heard if masks_AFT1 is None else heard * masks_AFT1[actor]
        return x_LD + residual.float().flatten(0, 1)
