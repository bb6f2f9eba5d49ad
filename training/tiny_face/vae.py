"""diffusers' ``AutoencoderKLWan`` as training runs it: whole clips in two calls, layers that are differentiable and
quick on a CPU, and residual branches that can be left out until their turn comes.

Without its residual branches a network is almost linear, and a step takes a quarter of the time.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders import autoencoder_kl_wan as wan
from torch import Tensor, nn
from torch.nn import functional

BASE_DIM = 8


class _Conv(wan.WanCausalConv3d):
    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        missing = self._padding[4]
        if cache_x is not None and missing:
            missing -= cache_x.shape[2]
            x = torch.cat([cache_x, x], dim=2)
        if missing:
            x = functional.pad(x, (0, 0, 0, 0, missing, 0))
        return torch.mkldnn_convolution(x, self.weight, self.bias, self.padding, self.stride, (1, 1, 1), 1)


class _Norm(wan.WanRMS_norm):
    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().sum(1, keepdim=True).clamp_min(1e-12).rsqrt() * self.scale) * self.gamma


class _Residual(wan.WanResidualBlock):
    active = True

    def forward(self, x: Tensor, feat_cache=None, feat_idx=None) -> Tensor:
        if self.active:
            return super().forward(x, feat_cache, feat_idx)
        feat_idx[0] += 2  # where its two convolutions would keep what they have seen
        return self.conv_shortcut(x)


class TrainableVAE(nn.Module):
    """The network, and clips [B, 3, 1 + 4n, H, W] in [-1, 1] to latents [B, 16, 1 + n, H/8, W/8] and back."""

    def __init__(self, base_dim: int = BASE_DIM):
        super().__init__()
        self.vae = vae = AutoencoderKLWan(base_dim=base_dim)
        for module in vae.modules():
            if type(module) is wan.WanCausalConv3d:
                module.__class__ = _Conv
                module.padding = (0, module._padding[2], module._padding[0])
            elif type(module) is wan.WanRMS_norm:
                module.__class__ = _Norm
            elif type(module) is wan.WanResidualBlock:
                module.__class__ = _Residual
                nn.init.zeros_(module.conv2.weight)
                nn.init.zeros_(module.conv2.bias)
            elif type(module) is wan.WanAttentionBlock:
                nn.init.zeros_(module.proj.weight)
                nn.init.zeros_(module.proj.bias)
        self._slots = [sum(isinstance(m, _Conv) for m in half.modules()) for half in (vae.encoder, vae.decoder)]

    def activate(self, widest: int) -> None:
        """The decoder's residual branches run where the picture is ``widest`` pixels for each 8 of the latent's, or
        smaller; the encoder's add nothing, see ``components``."""
        for name, module in self.vae.named_modules():
            if isinstance(module, _Residual):
                module.active = name.startswith("decoder") and _scale(name) <= widest

    def encode(self, clip: Tensor) -> Tensor:
        cache = [None] * self._slots[0]
        parts = [clip[:, :, :1], clip[:, :, 1:]]
        encoder = self.vae.encoder
        moments = [encoder(part, feat_cache=cache, feat_idx=[0]) for part in parts if part.shape[2]]
        return self.vae.quant_conv(torch.cat(moments, dim=2))[:, : self.vae.config.z_dim]

    def decode(self, latent: Tensor) -> Tensor:
        cache = [None] * self._slots[1]
        z = self.vae.post_quant_conv(latent)
        decoder = self.vae.decoder
        first = decoder(z[:, :, :1], feat_cache=cache, feat_idx=[0], first_chunk=True)
        return torch.cat([first, decoder(z[:, :, 1:], feat_cache=cache, feat_idx=[0])], dim=2)

    @torch.no_grad()
    def normalise(self, mean: Tensor, std: Tensor) -> None:
        """Latents that have ``mean`` and ``std`` [16] get those that the config publishes, by the 1 x 1 convolutions
        around them; what is decoded stays."""
        config, quant, post = self.vae.config, self.vae.quant_conv, self.vae.post_quant_conv
        factor = torch.tensor(config.latents_std) / std
        offset = torch.tensor(config.latents_mean) - mean * factor
        count = config.z_dim
        quant.weight[:count] *= factor.view(-1, 1, 1, 1, 1)
        quant.bias[:count] = quant.bias[:count] * factor + offset
        post.bias -= post.weight[:, :, 0, 0, 0] @ (offset / factor)
        post.weight /= factor.view(1, -1, 1, 1, 1)


def _scale(name: str) -> int:
    """Pixels of a block's picture for each 8 of the full one; the latent's have 1."""
    rest = name.partition(".")[2]
    index = rest.split(".")[1] if rest.count(".") else "0"
    if rest.startswith("mid_block"):
        return 1
    return 1 << int(index)
