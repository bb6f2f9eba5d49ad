"""The inner part of attention over int8 rings as it was before its second product was in int8, to compile and compare.

Values lay in the rings as keys do, with a scale a token, and were widened to bfloat16 in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowvram_kernels.aot import Case
from lowvram_kernels.triton_prepare import MAGIC, MAGIC_BITS

# Keys of a step and stages, as they were chosen for each chip.
STEPS = {80: (64, 3), 86: (64, 3), 89: (64, 3), 90: (64, 3), 120: (32, 3)}
# Four int8 to four bfloat16: each byte becomes the low bits of 2^23 as a float32.
TO_BF16 = tl.constexpr("""{
.reg .b32 u, a, b, c, d;
xor.b32 u, $2, 0x80808080;
prmt.b32 a, u, 0x4B000000, 0x7440;
prmt.b32 b, u, 0x4B000000, 0x7441;
prmt.b32 c, u, 0x4B000000, 0x7442;
prmt.b32 d, u, 0x4B000000, 0x7443;
sub.f32 a, a, 0f4B000080;
sub.f32 b, b, 0f4B000080;
sub.f32 c, c, 0f4B000080;
sub.f32 d, d, 0f4B000080;
prmt.b32 $0, a, b, 0x7632;
prmt.b32 $1, c, d, 0x7632;
}""")


@triton.jit
def _attend_kernel(
    q8, q_scale, q_mean, k, v, k_scale, v_scale, out, tokens, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Over one block, of one head: rows of ``k`` and ``v`` are HEADS * HEAD_DIM apart."""
    rows, dims = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L), tl.arange(0, HEAD_DIM)
    q = tl.load(q8 + rows[:, None] * HEAD_DIM + dims[None, :])
    scale, shift = tl.load(q_scale + rows), tl.load(q_mean + rows)
    top = tl.full((BLOCK_L,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_L,), tl.float32)
    result = tl.zeros((BLOCK_L, HEAD_DIM), tl.float32)
    for start in range(0, tokens, BLOCK_T):
        token = start + tl.arange(0, BLOCK_T)
        seen = token < tokens
        keys = tl.load(k + token[None, :] * (HEADS * HEAD_DIM) + dims[:, None], mask=seen[None, :], other=0)
        product = tl.dot(q, keys, tl.full((BLOCK_L, BLOCK_T), MAGIC_BITS, tl.int32), out_dtype=tl.int32)
        score = (product.to(tl.float32, bitcast=True) - MAGIC) * tl.load(k_scale + token)[None, :]
        score = tl.where(seen[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1) * scale + shift)
        weight = tl.exp2(score * scale[:, None] + (shift - higher)[:, None])
        fade = tl.exp2(top - higher)
        total = total * fade + tl.sum(weight, 1)
        values = tl.load(v + token[:, None] * (HEADS * HEAD_DIM) + dims[None, :], mask=seen[:, None], other=0)
        wide = tl.inline_asm_elementwise(TO_BF16, "=r,=r,r", [values], dtype=tl.bfloat16, is_pure=False, pack=4)
        weight = (weight * tl.load(v_scale + token)[None, :]).to(tl.bfloat16)
        result = tl.dot(weight, wide, result * fade[:, None])
        top = higher
    tl.store(out + rows[:, None] * HEAD_DIM + dims[None, :], (result / total[:, None]).to(out.dtype.element_ty))


def aot_case(generation: int) -> Case:
    keys, stages = STEPS[generation]
    floats = dict.fromkeys(("q_scale", "q_mean", "k_scale", "v_scale"), "*fp32")
    return Case(
        name="former attention",
        kernel=_attend_kernel,
        types=floats | {"q8": "*i8", "k": "*i8", "v": "*i8", "out": "*bf16", "tokens": "i32"},
        constants={"HEADS": 40, "HEAD_DIM": 128, "BLOCK_L": 128, "BLOCK_T": keys},
        num_warps=8,
        num_stages=stages,
    )
