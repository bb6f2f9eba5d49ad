"""One whole DiT block against what its products and its attention would take at the rates measured on the machine, and
replayed as a CUDA graph."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lowvram.denoise.cuda_graphs import Capture
from lowvram.denoise.kv_format import Bytes, Own, kv_format
from lowvram.loading.fused_block import fuse
from lowvram.loading.residual import joined
from lowvram_kernels.holding import holding
from lowvram_kernels.modules import Attention, QuantizedLinear, swap_linear
from lowvram_kernels.rotation import GROUP
from lowvram_kernels.rounding import round_up
from lowvram_kernels.rows import quantize_rows
from lowvram_models.attention import CrossAttention, Heads
from lowvram_models.config import DiTConfig
from lowvram_models.dit import CausalDiT, DiTBlock, LayerInputs, TimeEmbedding
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
    """A memory whose ring is full: a block replaces the oldest slot and sees them all, then the sink. With ``keep`` the
    sink's rotated keys stand at one address, as graphs want it."""

    def __init__(self, sizes: Sizes, scheme: str, dtype: torch.dtype, device: torch.device, keep: bool = False):
        head_dim = sizes.dim // sizes.heads
        self.kind = kv_format(scheme, sizes.heads, head_dim, dtype)
        self.slots = [
            self._random(sizes.tokens, sizes, dtype, device) for _ in range(sizes.ring_tokens // sizes.tokens)
        ]
        self.sink = self._random(sizes.sink_tokens, sizes, dtype, device)
        self.rope = random_rope(sizes.sink_tokens, head_dim, device)
        self.rotated = self.kind.room_for_keys(self.sink) if keep else None

    def _random(self, tokens: int, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Bytes:
        block = torch.empty(round_up(self.kind.nbytes(tokens), 16), dtype=torch.uint8, device=device)
        shape = (tokens, sizes.heads, sizes.dim // sizes.heads)
        self.kind.write(block, *(torch.randn(shape, dtype=dtype, device=device) for _ in range(2)))
        return block, tokens

    def attend(self, queries: Heads, keys: Heads, v_LNH: Tensor, rope: Rope) -> Tensor:
        own = Own(queries, keys, v_LNH, rope)
        return self.kind.attend(own, 0, self.slots, self.sink, self.rope, self.rotated)


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
        dit.blocks[0] = DiTBlock(config).to(dtype).eval().requires_grad_(False)
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


def graph_row(
    median_ms: Callable[[Callable[[], Any]], float],
    sizes: Sizes,
    scheme: str,
    dtype: torch.dtype,
    device: torch.device,
    capture: Capture,
    settle: Callable[[], Any],
) -> dict[str, Any]:
    """A block call by call and replayed as a graph: seconds that are spent once (the first call, which may compile, and
    the capture) apart from milliseconds of every call after that, of the device and of the host that asks it.

    ``settle`` lets the host wait for the device. ``equal``: both give the same values, bit for bit.
    """
    call, out = block_call(sizes, scheme, dtype, device, keep=True), torch.empty(sizes.tokens, sizes.dim, device=device)

    def eager() -> None:
        out.copy_(call())

    first_s = seconds(eager, settle)
    expected = out.clone()
    begin = time.perf_counter()
    with holding() as held:
        replay = capture(eager)
    settle()
    cold = {"first_call_s": first_s, "capture_s": time.perf_counter() - begin}
    out.zero_()
    replay()
    equal = torch.equal(expected, out)
    warm = {}
    for name, work in (("eager", eager), ("replayed", replay)):
        warm |= {f"{name}_ms": median_ms(work), f"{name}_host_ms": host_ms(work, settle)}
    del held
    row = {"sizes": dataclasses.asdict(sizes), "scheme": scheme, "cold": cold, "warm": warm, "equal": equal}
    return row | {"speedup": warm["eager_ms"] / warm["replayed_ms"]}


def seconds(work: Callable[[], Any], settle: Callable[[], Any]) -> float:
    settle()
    begin = time.perf_counter()
    work()
    settle()
    return time.perf_counter() - begin


def host_ms(work: Callable[[], Any], settle: Callable[[], Any], repeats: int = 10) -> float:
    """How long the host is busy with a call that the device need not have finished."""
    times = []
    for _ in range(repeats):
        settle()
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    settle()
    return statistics.median(times) * 1e3


def block_call(
    sizes: Sizes, scheme: str, dtype: torch.dtype, device: torch.device, group: int = 1, *, keep: bool = False
) -> Callable[[], Tensor]:
    block, memory = fused_block(sizes, scheme, dtype, device, group), FullRing(sizes, scheme, dtype, device, keep)
    x = torch.randn(sizes.tokens, sizes.dim, device=device)
    time = TimeEmbedding(torch.randn(sizes.dim, device=device), torch.randn(6, sizes.dim, device=device))
    text = torch.randn(sizes.text_tokens, sizes.dim, dtype=dtype, device=device)
    rope = random_rope(sizes.tokens, sizes.dim // sizes.heads, device)
    inputs = LayerInputs(time=time, text=text, rope=rope, frames=1)
    return lambda: joined(block(x, inputs, memory))


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
