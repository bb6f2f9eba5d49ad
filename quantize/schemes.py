"""Schemes of storing tensors: the one table of what is quantized and why, and the arithmetic of it.

INT8 is symmetric per output channel (a row of the weight, everything behind dimension 0 flattened): scale = amax / 127,
values -127..127. FP8 is e4m3 per output channel: scale = amax / 448. Unless it is not wanted, groups of neighbouring
input channels of the W8A8 INT8 weights are rotated in float32 before.
"""

from __future__ import annotations

import dataclasses
import re

import torch

from lowvram_kernels.errors import CheckpointError, ConfigError
from lowvram_kernels.rotation import GROUP, largest_group
from lowvram_kernels.rows import QMAX

Tensor = torch.Tensor

# Reading, merging and quantizing go in pieces of about this many values, so that float32 copies of them stay in the
# processor's second-level cache.
CHUNK_VALUES = 1 << 18

NF4_BLOCK = 64

GROUPS = (16, 32, 64, 128, 256)
"""Of channels that ``convert`` can rotate together, at the most."""

MIXED = "mixed"
"""The precision of a DiT whose Linears are stored in several: which, each tensor's scheme says."""

IN_NARROW = 16
"""Of channels that are rotated together where there are fewer than ``GROUP``: models so small run on processors, where
turning 128 of 128 channels takes as long as the product that it is for."""

EIGHT_BIT = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
KEPT = {"bf16": torch.bfloat16, "fp32": torch.float32}

# DiT weights in 8 bit with 8-bit activations: the Linears that run over every token in every layer. 96 % of the
# parameters and all of the arithmetic that grows with the video's size.
_W8A8 = re.compile(
    r"blocks\.\d+\.(self_attn|cross_attn)\.[qkvo]\.weight"
    r"|blocks\.\d+\.ffn\.[02]\.weight"
    r"|audio_injector\.injector\.\d+\.[qkvo]\.weight"
    r"|audio_injector\.injector_adain_layers\.\d+\.linear\.weight"
)
# DiT weights in 8 bit, dequantized at use: large convolutions that run in the sink pass only, twice a video.
_WEIGHT_ONLY = re.compile(r"frame_packer\.proj_[24]x\.weight")
# Of these, those whose inputs come from a norm, whose gain takes the factors that smooth them, and those where only a
# calibration says which factors are worth a product more.
_BEHIND_A_NORM = re.compile(
    r"blocks\.\d+\.(self_attn\.[qkv]|cross_attn\.q|ffn\.0)\.weight|audio_injector\.injector\.\d+\.q\.weight"
)
_ELSEWHERE = re.compile(
    r"blocks\.\d+\.(self_attn\.o|cross_attn\.o|ffn\.2)\.weight|audio_injector\.injector\.\d+\.o\.weight"
)
# Everything else of the DiT stays in bf16:
#   patch_embedding, cond_encoder, head.head   first and last layer: their error reaches the picture undamped
#   time_embedding, time_projection            steer every layer's modulation; run once a video over a few rows
#   text_embedding                             runs once a video; its output is read by every layer
#   casual_audio_encoder                       runs once a block over 85 frames; its output steers the lips
#   frame_packer.proj                          the newest motion frame, 64 inputs a channel: nothing to gain
#   norms, biases, modulation, masks           vectors


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How one tensor is stored. ``kind``: "kept", "rows" (8 bit a row with a scale), "quanto" (the same under
    optimum-quanto's names) or "nf4". ``group``: so many input channels each are rotated together before; 1: none are;
    see ``lowvram_kernels.rotation``. ``smooth``: before that, each input channel is divided by a factor; see
    ``smoothing``."""

    name: str
    kind: str
    dtype: torch.dtype
    group: int = 1
    smooth: bool = False


def dit_scheme(name: str, precision: str) -> Scheme:
    if precision in KEPT:
        return Scheme(precision, "kept", KEPT[precision])
    if _W8A8.fullmatch(name):
        return Scheme(precision, "rows", EIGHT_BIT[precision])
    if _WEIGHT_ONLY.fullmatch(name):
        return Scheme(f"{precision}_weight_only", "rows", EIGHT_BIT[precision])
    return Scheme("bf16", "kept", torch.bfloat16)


def chosen_group(rotate: bool | int | None) -> int:
    """The most input channels to rotate together: as ``rotate`` says, 1 for False, the default for True and None.

    Raises:
        ConfigError: a number that is none of ``GROUPS``.
    """
    if rotate is None or isinstance(rotate, bool):
        return 1 if rotate is False else GROUP
    if type(rotate) is not int or rotate not in GROUPS:  # 16.0 and a tensor are equal to 16, too
        raise ConfigError(
            f"rotate is {rotate!r}; expected {', '.join(map(str, GROUPS))} channels, True for {GROUP}, False for none"
        )
    return rotate


def with_rotation(scheme: Scheme, shape: tuple[int, ...], most: int = GROUP) -> Scheme:
    """The same with rotated groups where it is W8A8 INT8: of ``most`` input channels, or of the largest smaller power
    of two that divides them (none where they are odd, or ``most`` is 1). Layers narrower than ``GROUP`` channels have
    groups of ``IN_NARROW`` at most."""
    if scheme != Scheme("int8", "rows", torch.int8):
        return scheme
    most = most if shape[-1] >= GROUP else min(most, IN_NARROW)
    return dataclasses.replace(scheme, group=largest_group(shape[-1], most))


def with_smoothing(scheme: Scheme, name: str, *, measured: bool = False) -> Scheme:
    """The same with smoothed inputs where it is W8A8 INT8 of a layer behind a norm, or, with activations ``measured``,
    of one whose inputs no other layer reads."""
    if scheme.name != "int8" or scheme.kind != "rows":
        return scheme
    smooth = bool(_BEHIND_A_NORM.fullmatch(name) or (measured and _ELSEWHERE.fullmatch(name)))
    return dataclasses.replace(scheme, smooth=smooth)


def is_convolution(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of the VAE is a convolution's weight; norms have as many dimensions."""
    return name.endswith(".weight") and len(shape) >= 4


def vae_scheme(name: str, shape: tuple[int, ...], precision: str) -> Scheme:
    """All convolutions in 8 bit, dequantized at use. Biases and norms stay in the float32 that they are published in:
    they are 0.1 % of the bytes."""
    if precision in KEPT:
        return Scheme(precision, "kept", KEPT[precision])
    if is_convolution(name, shape):
        return Scheme(f"{precision}_weight_only", "rows", EIGHT_BIT[precision])
    return Scheme("fp32", "kept", torch.float32)


def text_encoder_scheme(name: str, shape: tuple[int, ...], precision: str) -> Scheme:
    """Linears in 8 or 4 bit, dequantized at use. Embedding, norms and position tables stay in bf16: the embedding is
    looked up, not multiplied, and its rows differ by orders of magnitude. In 4 bit so do Linears whose inputs are no
    multiple of 64, which the published encoder does not have."""
    if precision in KEPT:
        return Scheme(precision, "kept", KEPT[precision])
    linear = len(shape) == 2 and re.search(r"\.(SelfAttention\.[qkvo]|DenseReluDense\.w\w+)\.weight$", name)
    if not linear:
        return Scheme("bf16", "kept", torch.bfloat16)
    if precision == "nf4":
        # bitsandbytes' CPU kernels misread blocks that run over the end of a row.
        whole = shape[1] % NF4_BLOCK == 0
        return Scheme("nf4", "nf4", torch.uint8) if whole else Scheme("bf16", "kept", torch.bfloat16)
    return Scheme(f"{precision}_quanto", "quanto", EIGHT_BIT[precision])


def quantize_chunk(w_RK: Tensor, dtype: torch.dtype, name: str) -> tuple[Tensor, Tensor, float, float]:
    """Quantize rows in place of their float32 copy.

    Args:
        w_RK: float32 [rows, width]; destroyed.
        dtype: int8 or float8_e4m3fn.
        name: for the error.

    Returns:
        values [rows, width] of ``dtype``, scales float32 [rows], and the squared norms of error and weight.

    Raises:
        CheckpointError: a value is NaN or infinite.
    """
    amax = w_RK.abs().amax(dim=1)  # 17 times as fast as vector_norm with inf, on one core with AVX-512
    squares = torch.linalg.vector_norm(w_RK, 2, dim=1, dtype=torch.float32).double().square().sum()
    if not torch.isfinite(squares):
        raise not_finite(name)
    scale = amax / QMAX[dtype]
    # A scale below float32's normal range has too few bits to divide by: such a row becomes zeros, as one of zeros.
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)
    w_RK.div_(scale[:, None])
    if dtype is torch.int8:
        rounded = torch.round(w_RK)
        q = rounded.to(torch.int8)
    else:
        q = w_RK.to(dtype)
        rounded = q.to(torch.float32)
    off = torch.linalg.vector_norm(rounded.sub_(w_RK), 2, dim=1).mul_(scale)
    return q, scale, float(off.double().square().sum()), float(squares)


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite; by the largest magnitude, which takes a tenth of ``isfinite``'s time on
    bfloat16."""
    return values.numel() == 0 or bool(torch.isfinite(values.float().abs().amax()))


def not_finite(name: str) -> CheckpointError:
    return CheckpointError(f"{name} holds NaN or infinity; expected finite weights: fetch the checkpoint again")
