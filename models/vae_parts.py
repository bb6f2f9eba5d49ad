"""Parts of the VAE between which a stream is cut: stages of the encoder, head and tail of the decoder.

Slots are the causal cache: what each convolution that looks back needs again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusers.models.autoencoders import autoencoder_kl_wan as wan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanDecoder3d, WanEncoder3d
from torch import Tensor, nn

from lowvram_models.vae_layers import Slot, cached_conv, normed_conv


@dataclass(frozen=True, kw_only=True)
class EncoderStage:
    """A part of the encoder that keeps its own slots: ``run(x, slots) -> y`` replaces them in place."""

    run: Callable[[Tensor, list[Slot]], Tensor]
    num_slots: int


def encoder_stages(encoder: WanEncoder3d) -> list[EncoderStage]:
    """The encoder of diffusers (``WanEncoder3d.forward``) cut into its parts, in order."""

    def block(module: nn.Module) -> EncoderStage:
        run = lambda x, slots: module(x, feat_cache=slots, feat_idx=[0])  # noqa: E731
        return EncoderStage(run=run, num_slots=num_slots(module))

    def conv_in(x: Tensor, slots: list[Slot]) -> Tensor:
        return cached_conv(encoder.conv_in, x, slots, [0])

    def conv_out(x: Tensor, slots: list[Slot]) -> Tensor:
        return normed_conv(encoder.norm_out, encoder.conv_out, x, slots, [0])

    middle = [block(module) for module in (*encoder.down_blocks, encoder.mid_block)]
    return [EncoderStage(run=conv_in, num_slots=1), *middle, EncoderStage(run=conv_out, num_slots=1)]


def decoder_head(decoder: WanDecoder3d, z: Tensor, slots: list[Slot], position: list[int]) -> Tensor:
    """All that works at the latents' own resolution, the attention over the whole frame with it: [B, 16, T, h, w] to
    [B, C, T, h, w]. Replaces slots from ``position`` on, and moves it behind them."""
    x = cached_conv(decoder.conv_in, z, slots, position)
    for block in (decoder.mid_block, *first_block(decoder).resnets):
        x = block(x, feat_cache=slots, feat_idx=position)
    return x


def decoder_tail(decoder: WanDecoder3d, x: Tensor, slots: list[Slot], position: list[int]) -> Tensor:
    """The rest, from the first upsampling on: to frames [B, 3, T', 8 h, 8 w]; as of ``decoder_head``."""
    for block in (*first_block(decoder).upsamplers, *decoder.up_blocks[1:]):
        x = block(x, feat_cache=slots, feat_idx=position)
    return normed_conv(decoder.norm_out, decoder.conv_out, x, slots, position)


def first_block(decoder: WanDecoder3d) -> Any:
    """The block whose upsampling is the first; a part of the library, which is not typed."""
    return decoder.up_blocks[0]


def num_slots(module: nn.Module) -> int:
    """How many causal convolutions look back; those of temporal width 1 have nothing to remember."""
    convs = (m for m in module.modules() if isinstance(m, wan.WanCausalConv3d))
    return sum(conv.kernel_size[0] > 1 for conv in convs)
