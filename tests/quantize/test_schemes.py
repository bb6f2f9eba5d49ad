"""What is quantized, and the arithmetic of it against an independent float64 reference."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lowvram_kernels.errors import CheckpointError, ConfigError
from lowvram_models.config import DiTConfig
from lowvram_models.dit import CausalDiT
from lowvram_models.text_encoder import build_umt5
from lowvram_models.vae import build_vae
from lowvram_quantize.schemes import (
    chosen_group,
    dit_scheme,
    not_finite,
    quantize_chunk,
    text_encoder_scheme,
    vae_scheme,
    with_rotation,
)
from tests.quantize.checkpoints import quantized_rows, refusal

GOLDEN = Path(__file__).parents[1] / "golden"
EIGHT_BIT = [torch.int8, torch.float8_e4m3fn]


@pytest.fixture(scope="module")
def published_dit() -> CausalDiT:
    with torch.device("meta"):
        return CausalDiT(DiTConfig.from_dict(json.loads((GOLDEN / "dit_14b_config.json").read_text())))


def test_every_linear_that_runs_over_all_tokens_is_w8a8(published_dit):
    per_token = ("blocks.", "audio_injector.injector.", "audio_injector.injector_adain_layers.")
    linears = {
        f"{name}.weight"
        for name, module in published_dit.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(per_token)
    }
    assert len(linears) > 40 * 10
    parameters = dict(published_dit.named_parameters())
    schemes = {name: dit_scheme(name, "int8") for name in parameters}
    assert {name for name, scheme in schemes.items() if scheme.name == "int8"} == linears
    # Most of the bytes are in 8 bit, or the artifact would not be half as large.
    quantized = sum(parameters[name].numel() for name, scheme in schemes.items() if scheme.kind == "rows")
    assert quantized / sum(p.numel() for p in parameters.values()) > 0.95


def test_what_steers_the_dit_is_kept(published_dit):
    kept = {n for n, _ in published_dit.named_parameters() if dit_scheme(n, "fp8").kind == "kept"}
    for part in ("patch_embedding", "head", "time_embedding", "time_projection", "text_embedding", "casual_audio"):
        own = [n for n, _ in published_dit.named_parameters() if n.startswith(part)]
        assert own
        assert set(own) <= kept
    assert all(n in kept for n, p in published_dit.named_parameters() if p.ndim == 1)


def test_eight_bit_weights_are_matrices_or_convolutions(published_dit):
    for name, parameter in published_dit.named_parameters():
        scheme = dit_scheme(name, "int8")
        if scheme.kind == "rows":
            assert parameter.ndim == (5 if scheme.name.endswith("weight_only") else 2), name


def test_rotation_is_for_w8a8_int8_only_and_in_groups_that_divide_the_width(published_dit):
    for precision in ("int8", "fp8", "bf16"):
        for name, parameter in published_dit.named_parameters():
            scheme, shape = dit_scheme(name, precision), tuple(parameter.shape)
            turned = with_rotation(scheme, shape)
            assert turned.group == (256 if scheme.name == "int8" else 1), name
            assert dataclasses.replace(turned, group=1) == scheme
    linear = dit_scheme("blocks.0.ffn.2.weight", "int8")
    assert [with_rotation(linear, (4, width)).group for width in (384, 216, 34, 81)] == [128, 8, 2, 1]
    assert [with_rotation(linear, (4, width)).group for width in (320, 256, 255, 240, 64)] == [64, 256, 1, 16, 16]
    assert [with_rotation(linear, (4, 128), most).group for most in (1, 16, 64, 256)] == [1, 16, 16, 16]
    assert [with_rotation(linear, (4, 384), most).group for most in (1, 16, 64, 256)] == [1, 16, 64, 128]


@pytest.mark.parametrize(("rotate", "group"), [(None, 256), (True, 256), (False, 1), (16, 16), (64, 64), (256, 256)])
def test_how_many_channels_are_rotated_together(rotate, group):
    assert chosen_group(rotate) == group


@pytest.mark.parametrize(
    "rotate", [0, 1, 8, 48, 512, -16, "none", 16.0, torch.tensor(16), torch.tensor([16, 32]), [16]]
)
def test_groups_of_other_sizes_are_refused(rotate):
    with pytest.raises(ConfigError, match="expected 16, 32, 64, 128, 256 channels, True for 256, False for none"):
        chosen_group(rotate)


def test_vae_convolutions_are_quantized_and_the_rest_stays_float32():
    with torch.device("meta"):
        vae = build_vae(96)
    convs = {f"{n}.weight" for n, m in vae.named_modules() if isinstance(m, nn.Conv2d | nn.Conv3d)}
    schemes = {n: vae_scheme(n, tuple(p.shape), "fp8") for n, p in vae.named_parameters()}
    assert {n for n, s in schemes.items() if s.name == "fp8_weight_only"} == convs
    assert {s.name for n, s in schemes.items() if n not in convs} == {"fp32"}


@pytest.mark.parametrize(("precision", "name"), [("int8", "int8_quanto"), ("fp8", "fp8_quanto"), ("nf4", "nf4")])
def test_text_encoder_linears_are_quantized(precision, name):
    with torch.device("meta"):
        model = build_umt5(vocab_size=64, d_model=64, d_ff=128, num_heads=4, num_layers=2)
    linears = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    schemes = {n: text_encoder_scheme(n, tuple(p.shape), precision) for n, p in model.named_parameters()}
    assert {n for n, s in schemes.items() if s.name == name} == linears
    assert {s.name for n, s in schemes.items() if n not in linears} == {"bf16"}


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_float_precision_keeps_everything(precision):
    schemes = [
        dit_scheme("blocks.0.self_attn.q.weight", precision),
        vae_scheme("decoder.conv_in.weight", (8, 8, 3, 3, 3), precision),
        text_encoder_scheme("encoder.block.0.layer.0.SelfAttention.q.weight", (8, 8), precision),
    ]
    assert {(s.name, s.kind) for s in schemes} == {(precision, "kept")}


def weights(rows: int = 33, width: int = 70) -> torch.Tensor:
    """Rows of very different size, as a LoRA leaves them."""
    w = torch.randn(rows, width, generator=torch.Generator().manual_seed(3))
    return w * torch.logspace(-6, 3, rows)[:, None]


@pytest.mark.parametrize("dtype", EIGHT_BIT)
def test_values_and_scales_bit_for_bit(dtype):
    w = weights()
    q, scale, _, _ = quantize_chunk(w.clone(), dtype, "w")
    expected_q, expected_scale = quantized_rows(w, dtype)
    assert q.dtype == dtype
    assert torch.equal(q.view(torch.uint8), expected_q.view(torch.uint8))
    assert torch.equal(scale, expected_scale)


@pytest.mark.parametrize(("dtype", "largest"), [(torch.int8, 127), (torch.float8_e4m3fn, 448)])
def test_error_stays_within_half_a_step(dtype, largest):
    w = weights().double()
    q, scale, _, _ = quantize_chunk(w.float(), dtype, "w")
    assert torch.allclose(scale.double(), w.float().abs().amax(1).double() / largest, rtol=1e-7)
    assert q.float().abs().amax(1).eq(largest).all()
    off = (q.double() * scale.double()[:, None] - w).abs()
    # int8: half a step. e4m3: half of 2^-3 relative, half of the smallest step 2^-9 for subnormal values.
    half = torch.full_like(w, 0.5) if dtype is torch.int8 else (w / scale[:, None]).abs().mul(2**-4).clamp_min(2**-10)
    assert (off <= half * scale[:, None] * (1 + 1e-5)).all()


@pytest.mark.parametrize("dtype", EIGHT_BIT)
def test_the_two_squares_are_those_of_error_and_weight(dtype):
    w = weights()
    q, scale, off, size = quantize_chunk(w.clone(), dtype, "w")
    back = q.double() * scale.double()[:, None]
    assert off == pytest.approx((back - w.double()).square().sum().item(), rel=1e-4)
    assert size == pytest.approx(w.double().square().sum().item(), rel=1e-5)


@pytest.mark.parametrize("dtype", EIGHT_BIT)
def test_rows_that_have_no_size(dtype):
    w = torch.tensor([[0.0, 0.0], [1e-42, -1e-44], [-0.0, 1e-45], [2.0, -2.0]])
    q, scale, off, _ = quantize_chunk(w.clone(), dtype, "w")
    back = q.double() * scale.double()[:, None]
    assert scale.isfinite().all()
    assert (scale > 0).all()
    assert torch.equal(back[:3].abs() > 1e-30, torch.zeros(3, 2, dtype=torch.bool))
    assert torch.allclose(back[3], w[3].double(), rtol=1e-6)
    assert off < 1e-12


@pytest.mark.parametrize("dtype", EIGHT_BIT)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_not_finite(dtype, value):
    w = weights()
    w[20, 3] = value
    with refusal(CheckpointError, "blocks.7.q", "NaN or infinity", "expected finite", "fetch"):
        quantize_chunk(w, dtype, "blocks.7.q")
    assert isinstance(not_finite("w"), CheckpointError)
