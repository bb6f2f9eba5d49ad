"""One whole DiT block against what its products and its attention would take at the rates measured on the machine."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lowvram.fused_block import fuse
from lowvram.kv_format import Bytes, kv_format
from lowvram_kernels.modules import Attention, QuantizedLinear, swap_linear
from lowvram_kernels.rotation import GROUP
from lowvram_kernels.rows import quantize_rows
from lowvram_models.attention import CrossAttention, Keys
from lowvram_models.config import DiTConfig
from lowvram_models.dit import Block, CausalDiT, LayerInputs, TimeEmbedding
from lowvram_models.rope import Rope

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Widths of the model; tokens of the block, of the whole ring (a multiple of them) and of the sink."""

    dim: int
    ffn_dim: int
    heads: int
    text_tokens: int
    tokens: int
    ring_tokens: int
    sink_tokens: int


PUBLISHED = Sizes(dim=5120, ffn_dim=13824, heads=40, text_tokens=512, tokens=3168, ring_tokens=12672, sink_tokens=2640)
SMALL = Sizes(dim=512, ffn_dim=1408, heads=4, text_tokens=64, tokens=192, ring_tokens=768, sink_tokens=160)


class FullRing:
    """A memory whose ring is full: a block replaces the oldest slot and sees them all, then the sink."""

    def __init__(self, sizes: Sizes, scheme: str, dtype: torch.dtype, device: torch.device):
        head_dim = sizes.dim // sizes.heads
        self.kind = kv_format(scheme, sizes.heads, head_dim, dtype)
        self.slots = [
            self._random(sizes.tokens, sizes, dtype, device) for _ in range(sizes.ring_tokens // sizes.tokens)
        ]
        self.sink = self._random(sizes.sink_tokens, sizes, dtype, device)
        self.rope = random_rope(sizes.sink_tokens, head_dim, device)

    def _random(self, tokens: int, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Bytes:
        block = torch.empty(-(-self.kind.nbytes(tokens) // 16) * 16, dtype=torch.uint8, device=device)
        shape = (tokens, sizes.heads, sizes.dim // sizes.heads)
        self.kind.write(block, *(torch.randn(shape, dtype=dtype, device=device) for _ in range(2)))
        return block, tokens

    def attend(self, q_LNH: Tensor, keys: Keys, v_LNH: Tensor, rope: Rope) -> Tensor:
        self.kind.write_keys(self.slots[0][0], keys, rope, v_LNH)
        return self.kind.attend(q_LNH, self.slots, self.sink, self.rope)


def random_rope(tokens: int, head_dim: int, device: torch.device) -> Rope:
    angle = torch.rand(tokens, head_dim // 2, device=device) * 6
    return Rope(angle.cos(), angle.sin())


def fused_block(sizes: Sizes, scheme: str, dtype: torch.dtype, device: torch.device, group: int = 1) -> nn.Module:
    """A fused block with random weights, in int8 where ``scheme`` is "int8" (in rotated groups), else in ``dtype``."""
    config = DiTConfig(
        dim=sizes.dim, ffn_dim=sizes.ffn_dim, num_heads=sizes.heads, num_layers=1, freq_dim=8,
        text_len=sizes.text_tokens, audio_dim=8, audio_inject_layers=(), text_dim=8,
    )  # fmt: skip
    with torch.device("meta"):
        dit = CausalDiT(config)
    with torch.device(device):
        dit.blocks[0] = Block(config).to(dtype).eval().requires_grad_(False)
    if scheme == "int8":
        quantize(dit.blocks[0], group)
    for module in dit.modules():
        if isinstance(module, CrossAttention):
            module.attention = Attention()
    fuse(dit)
    return dit.blocks[0]


def quantize(block: nn.Module, group: int) -> None:
    for name in [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]:
        plain = block.get_submodule(name)
        q, scale = quantize_rows(plain.weight, torch.int8, group=group)
        swap_linear(block, name, torch.int8, group=group)
        new = block.get_submodule(name)
        assert isinstance(new, QuantizedLinear)
        new.weight.data, new.weight_scale.data, new.bias.data = q, scale[:, 0].contiguous(), plain.bias.data


def block_row(
    median_ms: Callable[[Callable[[], Any]], float],
    sizes: Sizes,
    rates: Mapping[str, float],
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Any]:
    """Times of the block in int8, with and without rotated groups, and in ``dtype``, each with rings of its kind, and
    their arithmetic limits.

    ``rates``: operations a second, "int8" and "wide" (those of ``dtype``). In int8 the layers' products and q k^T run
    at the first; p v and the attention to the text stay at the second.
    """
    name = str(dtype).removeprefix("torch.")
    rows: dict[str, Any] = {"sizes": dataclasses.asdict(sizes)}
    for kind, scheme, group in (("int8", "int8", 1), ("int8 rotated", "int8", GROUP), (name, "plain", 1)):
        call = block_call(sizes, scheme, dtype, device, group)
        ms, limits = median_ms(call), limits_ms(sizes, scheme, rates)
        total = math.fsum(limits.values())
        rows[kind] = {"ms": ms, "limit_ms": total, "of_limit": total / ms, "limits_ms": limits}
        del call
    return rows | {"speedup": rows[name]["ms"] / rows["int8"]["ms"]}


def block_call(sizes: Sizes, scheme: str, dtype: torch.dtype, device: torch.device, group: int) -> Callable[[], Tensor]:
    block, memory = fused_block(sizes, scheme, dtype, device, group), FullRing(sizes, scheme, dtype, device)
    x = torch.randn(sizes.tokens, sizes.dim, device=device)
    time = TimeEmbedding(torch.randn(sizes.dim, device=device), torch.randn(6, sizes.dim, device=device))
    text = torch.randn(sizes.text_tokens, sizes.dim, dtype=dtype, device=device)
    rope = random_rope(sizes.tokens, sizes.dim // sizes.heads, device)
    inputs = LayerInputs(time=time, text=text, rope=rope, frames=1)
    return lambda: block(x, inputs, memory)


def limits_ms(sizes: Sizes, scheme: str, rates: Mapping[str, float]) -> dict[str, float]:
    """What each part's multiplications and additions take at the measured rates."""
    dim, tokens = sizes.dim, sizes.tokens
    # q, k, v and o of the block's tokens, q and o again for the text, k and v of the text, and the feed-forward's two
    layers = 2 * dim * (dim * (6 * tokens + 2 * sizes.text_tokens) + 2 * tokens * sizes.ffn_dim)
    over_keys = 2 * tokens * (sizes.ring_tokens + sizes.sink_tokens) * dim
    narrow = rates["int8"] if scheme == "int8" else rates["wide"]
    operations = {
        "layers": layers / narrow,
        "q k^T": over_keys / narrow,
        "p v": over_keys / rates["wide"],
        "attention to the text": 4 * tokens * sizes.text_tokens * dim / rates["wide"],
    }
    return {part: seconds * 1e3 for part, seconds in operations.items()}
