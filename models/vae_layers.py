"""Layers of diffusers' Wan VAE, computing the same with less memory and time, under the same parameter names.

Activations are channels-last throughout: all channels of a pixel lie side by side, the order that convolutions of GPUs
want. ``channels_last`` brings a tensor into it, and every layer here keeps what it is given in that order.
"""

from __future__ import annotations

from typing import cast

import torch
from diffusers.models.autoencoders import autoencoder_kl_wan as wan
from torch import Tensor, nn
from torch.nn import functional

from lowvram_models.vae_order import channels_last, frames, pictures, steps_of

# The library stores a string in the slot of a temporal upsampler that has seen one latent frame only.
Slot = Tensor | str | None
FIRST = "Rep"

CACHED_INPUTS = 2
"""A causal convolution of temporal width 3 needs its last two inputs again."""


def lighten(vae: nn.Module) -> None:
    """Swap the layers below into ``vae``, in place.

    They add no state, only another way through the same weights, so changing a module's class is all there is to do.
    """
    for module in vae.modules():
        if type(module) is wan.WanCausalConv3d:
            columns, _, rows, *_ = _around(module)
            module.__class__ = CausalConv3d
            module.padding = (0, rows, columns)
        elif type(module) in _LIGHTER:
            module.__class__ = _LIGHTER[type(module)]


class CausalConv3d(wan.WanCausalConv3d):
    """The library's causal convolution; zeros around the frames are the convolution's own, not a padded copy.

    ``padding`` is (0, rows, columns), so that a ``_conv_forward`` of someone else's finds what is left to pad there.
    """

    def forward(self, x: Tensor, cache_x: Tensor | None = None, *, complete: bool = False) -> Tensor:
        """x [B, C, T, H, W] after the inputs ``cache_x`` [B, C, 0..2, H, W] -> [B, C', T / stride, H, W]. ``complete``:
        what it looks back at stands in front of x already."""
        missing = 0 if complete else _around(self)[4]
        x = channels_last(x)
        if cache_x is not None and missing:
            missing -= cache_x.shape[2]
            x = torch.cat([channels_last(cache_x), x], dim=2)
        if missing:
            x = functional.pad(x, (0, 0, 0, 0, missing, 0))
        return self._conv_forward(x, self.weight, self.bias)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return conv3d(x, weight, bias, stride=self.stride, padding=cast(tuple[int, ...], self.padding))


def _around(conv: wan.WanCausalConv3d) -> tuple[int, ...]:
    """Zeros before and behind columns, rows and frames, as the library keeps them."""
    return cast(tuple[int, ...], conv._padding)


def conv3d(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, stride: tuple[int, ...], padding: tuple[int, ...]
) -> Tensor:
    """``torch.nn.functional.conv3d``, on the CPU in float32 always through oneDNN.

    There PyTorch takes an im2col path unless batch x channels x frames x rows is over 20480: 4 times slower for the
    whole decoder at base width 8 and 128 x 192 pixels, on one core of an AMD EPYC with AVX-512.
    """
    if x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.mkldnn_convolution(x, weight, bias, padding, stride, (1, 1, 1), 1)
    found = functional.conv3d(x, weight, bias, stride, padding)
    # What a GPU gives lies like its input. PyTorch's "meta" device does not know that of three dimensions; of what has
    # no values it can be said.
    return found.as_strided(found.shape, steps_of(found.shape)) if found.is_meta else found


class ChannelNorm(wan.WanRMS_norm):
    """The library's norm over channels, x / |x| * sqrt(C) * gamma, with |x| in float32 and one rounding less.

    The library makes two float32 copies of half-precision activations, and its norm over a strided dimension is
    20 times slower on the CPU than squares and a sum.
    """

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x [B, C, ...] -> a tensor of its shape and dtype: a new one, or ``out``."""
        if x.device.type == "cpu":
            # A few channels at a time: no copy of all of x, and each part stays in the cache.
            norm = sum(part.float().square().sum(dim=1, keepdim=True) for part in x.split(16, dim=1)).sqrt_()
        else:
            norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
        factor = norm.clamp_min_(1e-12).reciprocal_().mul_(self.scale)
        # Multiplied in float32 and rounded once, without a float32 copy of x.
        return torch.mul(x, factor, out=torch.empty_like(x) if out is None else out).mul_(self.gamma)

    def then_silu(self, x: Tensor, out: Tensor) -> None:
        """SiLU behind the norm of x [B, C, ...], into ``out`` of its shape; what a runtime swaps for a pass of its
        own."""
        functional.silu(self(x, out), inplace=True)


class Upsample(wan.WanUpsample):
    """Nearest-neighbour upsampling in the tensor's own dtype: the library copies through float32 and back."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.interpolate(x, scale_factor=self.scale_factor, mode=self.mode)


class Conv2d(nn.Conv2d):
    """A convolution of pictures that are channels-last, those of one picture or one pixel too."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(channels_last(input), weight, bias)


class ResidualBlock(wan.WanResidualBlock):
    """The library's two convolutions behind norms; the shortcut is added in place, and what they need again is kept
    channels-last."""

    def forward(self, x: Tensor, feat_cache: list[Slot], feat_idx: list[int]) -> Tensor:  # type: ignore[override]
        """x [B, C, T, H, W] -> [B, C', T, H, W]; replaces two slots from ``feat_idx`` on, and moves it behind them."""
        shortcut = self.conv_shortcut(x)
        for norm, conv in ((self.norm1, self.conv1), (self.norm2, self.conv2)):
            x = normed_conv(norm, conv, x, feat_cache, feat_idx)
        return x.add_(shortcut)


class AttentionBlock(wan.WanAttentionBlock):
    """The library's attention over the pixels of each frame. Channels-last, they are rows as attention takes them."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, T, H, W] -> a new tensor of its shape."""
        _, channels, _, height, width = x.shape
        qkv = self.to_qkv(self.norm(pictures(x))).permute(0, 2, 3, 1).flatten(1, 2)  # [B T, H W, 3 C]
        q, k, v = qkv[:, None].chunk(3, dim=-1)
        seen = functional.scaled_dot_product_attention(q, k, v)[:, 0]
        rows = seen.reshape(-1, height, width, channels).permute(0, 3, 1, 2)
        return frames(self.proj(rows), x.shape[0]).add_(x)


class Resample(wan.WanResample):
    """The library's resampling. Where it doubles the frames it stacks the halves of a convolution's channels, which
    puts channels before frames again; here they become frames as they lie."""

    def forward(self, x: Tensor, feat_cache: list[Slot], feat_idx: list[int]) -> Tensor:  # type: ignore[override]
        """x [B, C, T, H, W] -> [B, C / 2, T or 2 T, 2 H, 2 W], or [B, C, T or T / 2, H / 2, W / 2]. Replaces a slot at
        ``feat_idx`` and moves that on, where it works in time."""
        if self.mode == "upsample3d":
            x = self._twice(x, feat_cache, feat_idx)
        x = frames(self.resample(pictures(x)), x.shape[0])
        return self._half(x, feat_cache, feat_idx) if self.mode == "downsample3d" else x

    def _twice(self, x: Tensor, slots: list[Slot], position: list[int]) -> Tensor:
        """[B, C, T, H, W] -> [B, C, 2 T, H, W]; of a video's first latent frame x itself."""
        index = position[0]
        position[0] += 1
        past = slots[index]
        if past is None:
            slots[index] = FIRST
            return x
        batch, channels, count, height, width = x.shape
        before = past if isinstance(past, Tensor) else None
        slots[index] = remembered(x, torch.zeros_like(x[:, :, -1:]) if before is None else before)
        both = self.time_conv(x, before).permute(0, 2, 3, 4, 1).unflatten(4, (2, channels))  # [B, T, H, W, 2, C]
        later = both.permute(0, 1, 4, 2, 3, 5).contiguous()
        return channels_last(later.view(batch, 2 * count, height, width, channels).permute(0, 4, 1, 2, 3))

    def _half(self, x: Tensor, slots: list[Slot], position: list[int]) -> Tensor:
        """[B, C, T, H, W] -> [B, C, T / 2, H, W]; of a video's first frame x itself."""
        index = position[0]
        position[0] += 1
        past, slots[index] = slots[index], x[:, :, -1:].clone()
        if not isinstance(past, Tensor):
            return x
        found: Tensor = self.time_conv(torch.cat([channels_last(past), x], dim=2))
        return found


_LIGHTER: dict[type, type] = {
    wan.WanRMS_norm: ChannelNorm,
    wan.WanUpsample: Upsample,
    wan.WanResidualBlock: ResidualBlock,
    wan.WanAttentionBlock: AttentionBlock,
    wan.WanResample: Resample,
    nn.Conv2d: Conv2d,
}


def cached_conv(conv: nn.Module, x: Tensor, slots: list[Slot], position: list[int]) -> Tensor:
    """``conv`` behind the inputs that its slot has of before; keeps those that it will need, and moves on."""
    index = position[0]
    position[0] += 1
    past, slots[index] = slots[index], remembered(x, slots[index])
    found: Tensor = conv(x, past if isinstance(past, Tensor) else None)
    return found


def normed_conv(norm: nn.Module, conv: nn.Module, x: Tensor, slots: list[Slot], position: list[int]) -> Tensor:
    """``cached_conv`` of x behind ``norm`` and SiLU, which is written to where the convolution reads it: behind the
    frames that it remembers, or zeros. ``conv`` is three frames wide and moves by one."""
    assert isinstance(norm, ChannelNorm)
    assert isinstance(conv, CausalConv3d)
    index = position[0]
    position[0] += 1
    past = slots[index]
    before = past.shape[2] if isinstance(past, Tensor) else 0
    batch, channels, count, *size = x.shape
    shape = (batch, channels, CACHED_INPUTS + count, *size)
    seen = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
    seen = channels_last(seen)
    if before < CACHED_INPUTS:
        seen[:, :, : CACHED_INPUTS - before].zero_()
    if isinstance(past, Tensor):
        seen[:, :, CACHED_INPUTS - before : CACHED_INPUTS].copy_(past)
    norm.then_silu(x, seen[:, :, CACHED_INPUTS:])
    slots[index] = seen[:, :, -min(CACHED_INPUTS, before + count) :].clone()
    found: Tensor = conv(seen, complete=True)
    return found


def remembered(x: Tensor, past: Slot) -> Tensor:
    """The last two frames of x [B, C, T, H, W] behind those of ``past``, in memory of their own; one frame where there
    are no more."""
    kept = x[:, :, -CACHED_INPUTS:].clone()
    if kept.shape[2] < CACHED_INPUTS and isinstance(past, Tensor):
        return torch.cat([channels_last(past[:, :, -1:]), channels_last(kept)], dim=2)
    return kept
