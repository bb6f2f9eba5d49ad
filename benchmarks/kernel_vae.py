"""One latent frame through the published VAE's decoder, as it runs here and as diffusers has it, in the same dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

from lowvram.loading.fused_vae import fuse_vae
from lowvram_models.vae import StreamingVAE, build_vae

Tensor = torch.Tensor
BASE_DIM = 96


def vae_row(
    watch: Callable[[Callable[[], Any]], float],
    latent_size: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    base_dim: int = BASE_DIM,
) -> dict[str, Any]:
    """Milliseconds in the steady state: the causal cache is full. Both from the same random weights; ``error`` is
    relative, of the frames."""
    torch.manual_seed(0)
    with device:
        model, library = build_vae(base_dim), AutoencoderKLWan(base_dim=base_dim).eval().requires_grad_(False)
    library.load_state_dict(model.state_dict())
    for vae in (model, library):
        for parameter in vae.parameters():
            parameter.data = parameter.data.to(dtype)
    fuse_vae(model)
    latents = torch.randn(16, 3, *latent_size, device=device)
    ours, theirs = StreamingVAE(model, dtype=dtype).start_decoder(), _Library(library, dtype)
    calls = {"ours": lambda: ours.decode(latents[:, -1:]), "diffusers as it is": lambda: theirs.decode(latents[:, -1:])}
    ours.prime(latents)
    theirs.decode(latents)
    frames = {name: call().float() for name, call in calls.items()}
    error = (frames["ours"] - frames["diffusers as it is"]).norm() / frames["diffusers as it is"].norm()
    times = {name: watch(call) for name, call in calls.items()}
    speedup = times["diffusers as it is"] / times["ours"]
    return {"latent_size": latent_size, "base_dim": base_dim, "ms": times, "speedup": speedup, "error": error.item()}


class _Library:
    """diffusers' decoder with a cache that lives from call to call, one latent frame at a time as it does."""

    def __init__(self, vae: AutoencoderKLWan, dtype: torch.dtype):
        self._vae: Any = vae
        self._dtype = dtype
        self._vae.clear_cache()
        self._cache = self._vae._feat_map
        device = next(vae.parameters()).device
        mean, std = (torch.tensor(vae.config[f"latents_{name}"], device=device) for name in ("mean", "std"))
        self._mean, self._std = mean.view(-1, 1, 1, 1), std.view(-1, 1, 1, 1)
        self._first = True

    def decode(self, latent: Tensor) -> Tensor:
        found = []
        for frame in (latent * self._std + self._mean).to(self._dtype).split(1, dim=1):
            z = self._vae.post_quant_conv(frame[None])
            found.append(self._vae.decoder(z, feat_cache=self._cache, feat_idx=[0], first_chunk=self._first)[0])
            self._first = False
        return torch.cat(found, dim=1).clamp_(-1, 1)
