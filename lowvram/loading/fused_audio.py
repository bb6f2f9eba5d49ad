"""The audio injection through the fused operations; what depends on the block's audio alone is made once a block.

Shapes: L tokens of F latent frames, D width, A actors, N heads, H head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lowvram.loading.fused_rows import linear, linears, rows_for, wanted
from lowvram_kernels.norm import add_gated, norm_rows
from lowvram_models.audio_adapter import ADAIN_EPS, AudioInjector, AudioTokens

Tensor = torch.Tensor


class FusedInjector(nn.Module):
    """Computes what ``AudioInjector`` does, from the same parameters under the same names; may change ``x``."""

    def __init__(self, plain: AudioInjector):
        super().__init__()
        self.injector, self.injector_adain_layers = plain.injector, plain.injector_adain_layers

    def forward(self, x_LD: Tensor, audio: AudioTokens, masks_AFT1: Tensor | None, index: int) -> Tensor:
        """[L, D] float32 -> the same with what is heard added."""
        attention: Any = self.injector[index]
        frames, dtype, heard = audio.frame.shape[1], audio.frame.dtype, None
        for actor in range(len(audio.frame)):
            gain, offset, k, v = self._of_actor(audio, index, actor)
            rows = norm_rows(x_LD, gain, offset, eps=ADAIN_EPS, **wanted(attention.q, dtype))
            q = attention.norm_q(linear(attention.q, rows, dtype))
            y = attention.attention(q.view(frames, -1, *q.shape[1:]), k, v)
            y = attention.o(y.reshape(x_LD.shape))
            if masks_AFT1 is not None:
                y = y * masks_AFT1[actor].flatten(0, 1)
            heard = y if heard is None else heard.float() + y
        return x_LD if heard is None else add_gated(x_LD, heard, None, out=x_LD)

    def _of_actor(self, audio: AudioTokens, index: int, actor: int) -> tuple[Tensor, ...]:
        """Gain and offset [F, D] of the norm, keys and values [F, 5, N, H] of the attention."""
        key = (self, index, actor)
        if audio.derived is not None and key in audio.derived:
            found: tuple[Tensor, ...] = audio.derived[key]
            return found
        attention: Any = self.injector[index]
        shift, scale = self.injector_adain_layers[index].modulation(audio.clip[actor])  # type: ignore[operator]
        tokens = audio.frame[actor]
        rows: dict[Any, Any] = {}
        k, v = linears(
            [(layer, rows_for(layer, tokens.flatten(0, 1), rows)) for layer in (attention.k, attention.v)], tokens.dtype
        )
        frames = tokens.shape[:2]
        k, v = attention.norm_k(k).unflatten(0, frames), attention.split(v.unflatten(0, frames))
        made = (1 + scale, shift.contiguous(), k, v)
        if audio.derived is not None:
            audio.derived[key] = made
        return made
