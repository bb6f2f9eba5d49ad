"""A DiT block, and the audio injection behind it, through the fused operations.

Each activation between two matrix products is read and written once: in 8 bit, made once for all layers that want it
alike. What depends on a block's audio alone is made once a block.
Shapes: L tokens of F latent frames, D width, A actors, N heads, H head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict, cast

import torch
from torch import nn

from lowvram.loading.residual import Residual, normed
from lowvram_kernels.chips import has_fp8_units
from lowvram_kernels.errors import CheckpointError
from lowvram_kernels.linear import linears_q8
from lowvram_kernels.modules import NormRope, QuantizedLinear, fold_gelu
from lowvram_kernels.norm import add_gated_norm_rows
from lowvram_kernels.rope import Projection, norm_both
from lowvram_kernels.rows import NAMES, quantize_rows
from lowvram_models.attention import AttentionMemory, HeadNorm
from lowvram_models.audio_adapter import ADAIN_EPS, AudioInjector, AudioTokens
from lowvram_models.dit import CausalDiT, DiTBlock, LayerInputs, TimeEmbedding
from lowvram_models.rope import Rope

Tensor = torch.Tensor
Rows = Sequence[Tensor | None]
"""Activations [L, D] in the dtype to compute in and None, or in 8 bit and their scale a row."""


class Wanted(TypedDict):
    """What a layer wants its input in: 8 bit where it multiplies in 8 bit, in groups rotated as its weight's were."""

    dtype: torch.dtype
    group: int


def wanted(layer: nn.Module, dtype: torch.dtype) -> Wanted:
    """``dtype`` where the layer does not multiply in 8 bit."""
    if not isinstance(layer, QuantizedLinear):
        return Wanted(dtype=dtype, group=1)
    computes = layer.weight.dtype is torch.int8 or has_fp8_units(layer.weight.device)
    return Wanted(dtype=layer.weight.dtype if computes else dtype, group=layer.group)


def smoothing(layer: nn.Module) -> Tensor | None:
    """The factors [K] that a layer's inputs are smoothed by, if any. A norm before it takes them in its gain and
    offset, so that they cost no pass over activations; they are powers of two, of which a product loses no bit."""
    return layer.smooth_scale if isinstance(layer, QuantizedLinear) else None


def modulated(layer: nn.Module, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Gain (1 + scale) and offset (shift) of the norm before a layer, smoothed for it; in as many launches without."""
    factors = smoothing(layer)
    return (
        (1 + scale, shift.contiguous())
        if factors is None
        else (torch.addcmul(factors, scale, factors), shift * factors)
    )


def rows_for(layer: nn.Module, x_LD: Tensor, made: dict[Any, Any]) -> Rows:
    """``x`` as ``layer`` wants its input; ``made`` keeps what was made of ``x`` for others."""
    how = wanted(layer, x_LD.dtype)
    if how["dtype"] is x_LD.dtype:
        return x_LD, None
    if isinstance(layer, QuantizedLinear) and layer.smooth_scale is not None:  # factors of its own
        return quantize_rows(x_LD, how["dtype"], group=how["group"], smooth_K=layer.smooth_scale)
    key = tuple(how.values())
    if key not in made:
        made[key] = quantize_rows(x_LD, how["dtype"], group=how["group"])
    rows: Rows = made[key]
    return rows


def linear(layer: Any, rows: Rows, dtype: torch.dtype) -> Tensor:
    """A layer over rows as it wants them, in ``dtype``."""
    values, scale = rows
    out: Tensor = layer(values) if scale is None else layer.forward_quantized(values, scale, dtype)
    return out


def linears(products: Sequence[tuple[Any, Rows]], dtype: torch.dtype) -> list[Tensor]:
    """Several layers, each over its rows: what is all in 8 bit takes one launch where there is one."""
    ready = [layer.operands(*rows) for layer, rows in products if rows[1] is not None and not layer.gelu]
    if len(ready) == len(products):
        return linears_q8(ready, dtype=dtype)
    return [linear(layer, rows, dtype) for layer, rows in products]


def projection(norm: HeadNorm | NormRope, x_LD: Tensor) -> Projection:
    return Projection(x_LD, norm.weight, norm.eps)


class FusedInjector(nn.Module):
    """Computes what ``AudioInjector`` does, from the same parameters under the same names."""

    def __init__(self, plain: AudioInjector):
        super().__init__()
        self.injector, self.injector_adain_layers = plain.injector, plain.injector_adain_layers

    def forward(
        self, x: Tensor | Residual, audio: AudioTokens, masks_AFT1: Tensor | None, index: int
    ) -> Tensor | Residual:
        """[L, D] float32 -> the same with what is heard to be added to it."""
        attention: Any = self.injector[index]
        frames, dtype, heard = audio.frame.shape[1], audio.frame.dtype, None
        for actor in range(len(audio.frame)):
            gain, offset, k, v = self._of_actor(audio, index, actor)
            x, *rows = normed(x, gain, offset, eps=ADAIN_EPS, **wanted(attention.q, dtype))
            q = attention.norm_q(linear(attention.q, rows, dtype))
            y = attention.attention(q.view(frames, -1, *q.shape[1:]), k, v)
            y = attention.o(y.reshape(x.shape))
            if masks_AFT1 is not None:
                y = y * masks_AFT1[actor].flatten(0, 1)
            heard = y if heard is None else heard.float() + y
        return x if heard is None or isinstance(x, Residual) else Residual(x, heard, None)

    def _of_actor(self, audio: AudioTokens, index: int, actor: int) -> tuple[Tensor, ...]:
        """Gain and offset [F, D] of the norm, keys and values [F, 5, N, H] of the attention."""
        key = (self, index, actor)
        if audio.derived is not None and key in audio.derived:
            found: tuple[Tensor, ...] = audio.derived[key]
            return found
        attention: Any = self.injector[index]
        shift, scale = self.injector_adain_layers[index].modulation(audio.clip[actor])  # type: ignore[operator]
        gain, offset = modulated(attention.q, scale, shift)
        tokens = audio.frame[actor]
        rows: dict[Any, Any] = {}
        k, v = linears(
            [(layer, rows_for(layer, tokens.flatten(0, 1), rows)) for layer in (attention.k, attention.v)], tokens.dtype
        )
        frames = tokens.shape[:2]
        k, v = attention.norm_k(k).unflatten(0, frames), attention.split(v.unflatten(0, frames))
        made = (gain, offset, k, v)
        if audio.derived is not None:
            audio.derived[key] = made
        return made


class FusedBlock(nn.Module):
    """Computes what ``Block`` does, from the same parameters under the same names.

    The input of the self-attention's three projections is normalised, modulated and quantized once for all of them;
    residual, gate and the next norm go in one pass, the last one in that of whatever comes behind the block.
    Shapes as there.
    """

    def __init__(self, block: DiTBlock):
        super().__init__()
        self.dim, self.eps = block.dim, block.eps
        self.modulation = block.modulation
        self.self_attn, self.norm3, self.cross_attn, self.ffn = (
            block.self_attn,
            block.norm3,
            block.cross_attn,
            block.ffn,
        )
        _check_shared_input(self.self_attn.q, self.self_attn.k, self.self_attn.v)
        fold_gelu(self.ffn)

    def forward(self, residual: Tensor | Residual, inputs: LayerInputs, memory: AttentionMemory) -> Residual:
        """[L, D] float32 -> [L, D] float32. A tensor is not changed, a residual is taken."""
        dtype, eps = inputs.text.dtype, self.eps
        shift1, gain1, gate1, shift2, gain2, gate2, *middle = self._modulation(inputs.time)
        mine, text, wide, narrow = self.self_attn, self.cross_attn, self.ffn[0], self.ffn[2]
        # What is not needed any more is let go at once: these are the largest tensors of a run beside its memory.
        x, *h = normed(residual, gain1, shift1, eps=eps, **wanted(mine.q, dtype))
        room = x if isinstance(residual, Residual) else None
        del residual
        q, k, v = linears([(layer, h) for layer in (mine.q, mine.k, mine.v)], dtype)
        del h
        heads = (ProjectedHeads(mine.norm_q, q), ProjectedHeads(mine.norm_k, k))
        v = v.view(len(v), mine.num_heads, -1)
        y = mine.o(_joined(memory.attend(*heads, v, inputs.rope)))
        del q, k, v, heads
        gain, offset = middle or (self.norm3.weight, self.norm3.bias)
        x, *h = add_gated_norm_rows(x, y, gate1, gain, offset, eps=eps, **wanted(text.q, dtype), out=room)
        del y
        # Anew in every step, as the queries are: kept for 40 layers they would take 420 MB of the card (2 * 512 * 5120
        # numbers of 2 bytes each), to spare less than 3 % of a layer's products.
        of_text = [(layer, rows_for(layer, inputs.text, inputs.of_text)) for layer in (text.k, text.v)]
        q, k, v = linears([(text.q, h), *of_text], dtype)
        del h
        q, k = norm_both(projection(text.norm_q, q), projection(text.norm_k, k), text.num_heads)
        y = text.o(_joined(text.attention(q, k, v.view(len(v), text.num_heads, -1))))
        del q, k, v
        x, *h = add_gated_norm_rows(x, y, None, gain2, shift2, eps=eps, **wanted(wide, dtype), out=x)
        del y
        hidden = self.ffn[1](linear(wide, h, dtype))
        del h
        y = narrow(hidden)
        del hidden
        return Residual(x, y, gate2)

    def _modulation(self, time: TimeEmbedding) -> tuple[Tensor, ...]:
        """(shift, gain, gate) twice, [D] float32 each, and gain and offset of the norm before the cross-attention where
        they are not the stored ones; smoothed for the layers behind them. Computed in the first call at that timestep.
        Nothing of it lies where the layer's weights do: other layers' come there."""
        vectors: tuple[Tensor, ...] | None = time.derived.get(self)
        if vectors is None:
            shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation[0].float() + time.blocks).unbind(0)
            gain1, shift1 = modulated(self.self_attn.q, scale1, shift1)
            gain2, shift2 = modulated(self.ffn[0], scale2, shift2)
            factors = smoothing(self.cross_attn.q)
            middle = () if factors is None else (self.norm3.weight * factors, self.norm3.bias * factors)
            vectors = time.derived[self] = (shift1, gain1, gate1, shift2, gain2, gate2, *middle)
        return vectors


class ProjectedHeads:
    """A block's queries or keys before their norm. Called as ``lowvram_models.attention.Heads`` are; an 8-bit ring
    takes the projection itself, so that what is normed stands nowhere else."""

    def __init__(self, norm: HeadNorm | NormRope, x_LD: Tensor):
        self._norm, self.projection = norm, projection(norm, x_LD)

    def __call__(self, rope: Rope | None) -> Tensor:
        heads: Tensor = self._norm(self.projection.x_TD, rope)
        return heads


def _check_shared_input(*layers: nn.Module) -> None:
    """Rows are made once for all of them, so that their weights have to be stored and rotated alike."""
    kinds = [layer.weight.dtype if isinstance(layer, QuantizedLinear) else "plain" for layer in layers]
    if len(set(kinds)) > 1:
        raise CheckpointError(
            f"q, k and v of one block, which share their input, are stored in {_said(kinds)}; expected the same for "
            "all three: convert the checkpoint again"
        )
    smoothed = [isinstance(layer, QuantizedLinear) and layer.smooth_scale is not None for layer in layers]
    if len(set(smoothed)) > 1:
        raise CheckpointError(
            f"q, k and v of one block, which share their input, have it smoothed: {smoothed}; expected the same for "
            "all three: convert the checkpoint again"
        )
    groups = [layer.group if isinstance(layer, QuantizedLinear) else 1 for layer in layers]
    if len(set(groups)) > 1:
        raise CheckpointError(
            f"q, k and v of one block have their inputs rotated in groups of {groups}; expected the same for all "
            "three: convert the checkpoint again"
        )


def _said(kinds: Sequence[torch.dtype | str]) -> str:
    return ", ".join(kind if isinstance(kind, str) else NAMES[kind] for kind in kinds)


def _joined(x_LNH: Tensor) -> Tensor:
    """[L, N, H] -> [L, D], in one call where nothing has to be copied."""
    return x_LNH.view(len(x_LNH), -1) if x_LNH.is_contiguous() else x_LNH.flatten(-2)


def fuse(dit: CausalDiT) -> None:
    """Swap fused blocks, and the norm of queries and keys with RoPE in one pass, into a model; parameters stay."""
    for parent in list(dit.modules()):
        for name, child in parent.named_children():
            if isinstance(child, HeadNorm):
                setattr(parent, name, NormRope(child.weight, child.num_heads, child.eps))
    blocks = cast(Sequence[DiTBlock], dit.blocks)
    dit.blocks = nn.ModuleList(FusedBlock(block) for block in blocks)
    dit.set_submodule("audio_injector", FusedInjector(dit.audio_injector))
