"""What one latent frame of the published VAE's decoder computes and moves, counted over the code itself without values.

As it runs on a GPU: a norm with its SiLU is one launch that reads and writes once. Read by ``vae_int8.py`` and
``vae_overlap.py``. Shapes are those of PyTorch's "meta" device; weights are bfloat16.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowvram.loading.fused_vae import fuse_vae
from lowvram_models.vae import StreamingVAE, build_vae

Tensor = torch.Tensor
BASE_DIM = 96
_PRODUCTS = {"convolution", "mkldnn_convolution", "_scaled_dot_product_fused_attention_overrideable"}
# They make no values: a shape, or another view of what is there.
_NOTHING = ("empty", "new_empty", "detach", "lift")


@dataclasses.dataclass(kw_only=True)
class Counts:
    """``products`` are multiplications and additions of convolutions, ``wide`` those of convolutions with at least 32
    input channels and a window; ``product_bytes`` is what they read and write, ``pass_bytes`` what all else does, and
    ``launches`` are kernels, at least one each."""

    products: int = 0
    wide: int = 0
    product_bytes: int = 0
    pass_bytes: int = 0
    launches: int = 0
    by_name: dict[str, int] = dataclasses.field(default_factory=dict)


class Counting(TorchDispatchMode):
    """Counts every operation inside; views are none."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if name.startswith(_NOTHING) or not made or (func.is_view and not func._schema.is_mutable):
            return out
        counts = self.counts
        written = (kwargs or {}).get("out")  # is among both
        nbytes = sum(t.nbytes for t in (*inputs, *made)) - (written.nbytes if isinstance(written, Tensor) else 0)
        counts.launches += 1
        if name in _PRODUCTS:
            counts.product_bytes += nbytes
            if "convolution" in name:
                weight = args[1]
                operations = 2 * made[0].numel() * weight[0].numel()
                counts.products += operations
                counts.wide += operations if weight.shape[1] >= 32 and weight[0, 0].numel() > 1 else 0
        else:
            counts.pass_bytes += nbytes
            counts.by_name[name] = counts.by_name.get(name, 0) + nbytes
        return out

    def fused(self, x: Tensor, gamma: Tensor, out: Tensor) -> Tensor:
        """Stands for ``channel_norm_silu``, whose parts nobody runs."""
        self.counts.launches += 1
        nbytes = x.nbytes + gamma.nbytes + out.nbytes
        self.counts.pass_bytes += nbytes
        self.counts.by_name["channel_norm_silu"] = self.counts.by_name.get("channel_norm_silu", 0) + nbytes
        return out


def decoder_counts(height: int, width: int, *, fused: bool = True) -> Counts:
    """Of a latent frame in the steady state, at ``height`` x ``width`` pixels; without ``fused`` as PyTorch alone
    computes it."""
    with torch.device("meta"):
        model = build_vae(BASE_DIM)
    if fused:
        fuse_vae(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    vae = StreamingVAE(model, dtype=torch.bfloat16)
    vae._mean, vae._std = vae._mean.to("meta"), vae._std.to("meta")
    latent = torch.empty(16, 3, height // 8, width // 8, device="meta")
    decoder = vae.start_decoder()
    decoder.prime(latent)
    with Counting() as seen, mock.patch("lowvram.loading.fused_vae.channel_norm_silu", seen.fused):
        decoder.decode(latent[:, :1])
    return seen.counts


def decoder_bytes() -> dict[str, int]:
    """Of the decoder's weights in 8 bit and in bfloat16, and how many convolutions there are."""
    with torch.device("meta"):
        decoder = build_vae(BASE_DIM).decoder
    convolutions = [m for m in decoder.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]
    values = sum(m.weight.numel() for m in convolutions)
    return {"convolutions": len(convolutions), "int8": values, "bf16": 2 * values}
