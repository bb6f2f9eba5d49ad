"""The causal S2V DiT: embeddings, layers and head under the published tensor names.

The loop over layers belongs to the caller (``lowvram.denoise.rollout``), so that weights may come and go between two
layers and several blocks may share one pass. Source: model-spec section 4 (LiveAvatar, ``causal_model_s2v``).
Shapes: L tokens, D width, F latent frames, T tokens a latent frame, C latent channels, h x w latent size.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lowvram_models.attention import AttentionMemory, CrossAttention, SelfAttention
from lowvram_models.audio_adapter import AudioEncoder, AudioInjector, AudioTokens
from lowvram_models.config import DiTConfig
from lowvram_models.constants import MOTION_FRAMES, MOTION_LATENTS
from lowvram_models.rope import Rope

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class TimeEmbedding:
    """One timestep: ``head`` [D] for the head, ``blocks`` [6, D] for the layers; float32. ``derived`` has what layers
    made of it, each under a key of its own, so that they make it once."""

    head: Tensor
    blocks: Tensor
    derived: dict[Any, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class LayerInputs:
    """What a layer needs besides the tokens: the same for all layers of one call.

    ``frames`` is the number of equal groups of tokens that audio speaks to (latent frames); with ``audio`` None
    (the sink pass) nothing is injected. ``actor_masks`` [A, F, T, 1]. ``of_text`` has what layers made of ``text`` for
    all of them: pass the same dictionary as long as the text is the same.
    """

    time: TimeEmbedding
    text: Tensor
    rope: Rope
    frames: int
    audio: AudioTokens | None = None
    actor_masks: Tensor | None = None
    of_text: dict[Any, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)


class DiTBlock(nn.Module):
    """Self-attention, cross-attention to the text and feed-forward, each behind a norm; residual in float32."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.dim, self.eps = config.dim, config.eps
        self.modulation = nn.Parameter(torch.zeros(1, 6, config.dim))
        self.self_attn = SelfAttention(config.dim, config.num_heads, config.eps)
        self.norm3 = nn.LayerNorm(config.dim, eps=config.eps)
        self.cross_attn = CrossAttention(config.dim, config.num_heads, config.eps)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, config.dim)
        )

    def forward(self, x_LD: Tensor, inputs: LayerInputs, memory: AttentionMemory) -> Tensor:
        """[L, D] float32 -> [L, D] float32. Every latent frame of a call is at the same timestep."""
        dtype = inputs.text.dtype
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation[0].float() + inputs.time.blocks).unbind(0)
        h = self._modulated(x_LD, shift1, scale1).to(dtype)
        x = x_LD + gate1 * self.self_attn(h, inputs.rope, memory).float()
        h = F.layer_norm(x, (self.dim,), self.norm3.weight.float(), self.norm3.bias.float(), self.eps).to(dtype)
        x = x + self.cross_attn(h, inputs.text).float()
        h = self._modulated(x, shift2, scale2).to(dtype)
        return x + gate2 * self.ffn(h).float()

    def _modulated(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(x, (self.dim,), eps=self.eps) * (1 + scale) + shift


class Head(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        self.dim, self.eps = config.dim, config.eps
        self.modulation = nn.Parameter(torch.zeros(1, 2, config.dim))
        self.head = nn.Linear(config.dim, config.out_dim * 4)

    def forward(self, x_LD: Tensor, time: TimeEmbedding, dtype: torch.dtype) -> Tensor:
        """[L, D] -> the values of each token's patch, [L, 4 C] float32."""
        shift, scale = (self.modulation[0].float() + time.head).unbind(0)
        x = F.layer_norm(x_LD, (self.dim,), eps=self.eps) * (1 + scale) + shift
        return self.head(x.to(dtype)).float()


class FramePacker(nn.Module):
    """Motion latents to tokens, coarser the older they are: the last 1, the 2 before, the 16 before."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.proj = nn.Conv3d(in_dim, dim, (1, 2, 2), stride=(1, 2, 2))
        self.proj_2x = nn.Conv3d(in_dim, dim, (2, 4, 4), stride=(2, 4, 4))
        self.proj_4x = nn.Conv3d(in_dim, dim, (4, 8, 8), stride=(4, 8, 8))

    def forward(self, motion_CFhw: Tensor) -> Tensor:
        """[C, 19, h, w] -> [tokens, D]."""
        if motion_CFhw.shape[1] != MOTION_LATENTS:
            raise ValueError(
                f"motion latents have {motion_CFhw.shape[1]} latent frames; expected {MOTION_LATENTS} "
                f"({MOTION_FRAMES} video frames)"
            )
        oldest, older, last = motion_CFhw.split([16, 2, 1], dim=1)
        parts = ((self.proj, last), (self.proj_2x, older), (self.proj_4x, oldest))
        return torch.cat([_tokens(conv(latent[None])) for conv, latent in parts])


class CausalDiT(nn.Module):
    """The whole model; see the module's docstring for who runs its layers."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        dim = config.dim
        patch = (1, 2, 2)
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, kernel_size=patch, stride=patch)
        self.cond_encoder = nn.Conv3d(config.cond_dim, dim, kernel_size=patch, stride=patch)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.num_layers))
        self.head = Head(config)
        self.casual_audio_encoder = AudioEncoder(config)  # the published spelling
        self.audio_injector = AudioInjector(config)
        self.trainable_cond_mask = nn.Embedding(3, dim)
        self.frame_packer = FramePacker(config.in_dim, dim)

    def embed_time(self, timestep: float) -> TimeEmbedding:
        """Embed one timestep (0 to 1000) in float32, whatever the weights' dtype."""
        half = self.config.freq_dim // 2
        device = self.time_embedding[0].get_parameter("weight").device
        freqs = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=device) / half)
        angle = timestep * freqs
        x = torch.cat([angle.cos(), angle.sin()]).float()
        head = _linear32(self.time_embedding[2], F.silu(_linear32(self.time_embedding[0], x)))
        blocks = _linear32(self.time_projection[1], F.silu(head))
        return TimeEmbedding(head, blocks.unflatten(0, (6, -1)))

    def embed_text(self, context_KD: Tensor) -> Tensor:
        """[tokens, text_dim] -> [text_len, D]. The padding is embedded and attended to: the model was trained so."""
        missing = self.config.text_len - context_KD.shape[0]
        if missing < 0:
            raise ValueError(f"context has {len(context_KD)} tokens; the model takes {self.config.text_len} at most")
        return self.text_embedding(F.pad(context_KD, (0, 0, 0, missing)))

    def embed_audio(self, audio_ASCT: Tensor) -> AudioTokens:
        """[A, 25, audio_dim, 4 F] of one block -> tokens; the same for every step of the block."""
        return self.casual_audio_encoder(audio_ASCT)

    def embed_latent(self, latent_CFhw: Tensor, pose_CFhw: Tensor | None = None) -> Tensor:
        """Noisy latent [C, F, h, w] (with pose latents of the same shape, or none) -> [F * T, D] float32."""
        x = self.patch_embedding(latent_CFhw[None])
        pose = torch.zeros_like(latent_CFhw) if pose_CFhw is None else pose_CFhw
        x = x + self.cond_encoder(pose[None])
        x = _tokens(x) + self.trainable_cond_mask.weight[0]
        # In rows, as what follows reads them: the convolution leaves the tokens of a channel beside each other.
        return x.to(torch.float32, memory_format=torch.contiguous_format)

    def embed_conditions(self, reference_C1hw: Tensor, motion_CFhw: Tensor) -> Tensor:
        """Reference [C, 1, h, w] and motion latents [C, 19, h, w] -> the sink's tokens [L, D] float32."""
        mask = self.trainable_cond_mask.weight
        reference = _tokens(self.patch_embedding(reference_C1hw[None])) + mask[1]
        return torch.cat([reference, self.frame_packer(motion_CFhw) + mask[2]]).float()

    def layer(self, index: int, x_LD: Any, inputs: LayerInputs, memory: AttentionMemory) -> Any:
        """Block ``index`` and, where the config says so, the audio injection behind it. [L, D] float32 -> same.

        What the residual is between two layers is the business of the blocks, where a runtime has swapped its own."""
        x_LD = self.blocks[index](x_LD, inputs, memory)
        if inputs.audio is None or index not in self.config.audio_inject_layers:
            return x_LD
        which = self.config.audio_inject_layers.index(index)
        return self.audio_injector(x_LD, inputs.audio, inputs.actor_masks, which)

    def unpatchify(self, x_LP: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """What the head gives for the tokens of ``grid`` = (frames, rows, columns) -> velocity [C, F, h, w]."""
        frames, rows, columns = grid
        x = x_LP.view(frames, rows, columns, 1, 2, 2, self.config.out_dim)
        x = x.permute(6, 0, 3, 1, 4, 2, 5)
        return x.reshape(self.config.out_dim, frames, rows * 2, columns * 2)


def _tokens(x_1DFHW: Tensor) -> Tensor:
    return x_1DFHW[0].flatten(1).transpose(0, 1)


def _linear32(layer: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, layer.get_parameter("weight").float(), layer.get_parameter("bias").float())
