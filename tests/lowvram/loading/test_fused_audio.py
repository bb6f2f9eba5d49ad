"""The fused audio injection against the models' own, bit by bit, and that its cache does not outlive what it is of."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lowvram.loading.fused_block import FusedInjector
from lowvram.loading.residual import joined
from lowvram_kernels.modules import Attention, swap_linear
from lowvram_kernels.rows import quantize_rows
from lowvram_kernels.trace import trace_kernels
from lowvram_models.audio_adapter import AudioInjector, AudioTokens
from lowvram_models.config import DiTConfig

CONFIG = DiTConfig(
    dim=24, ffn_dim=32, num_heads=2, num_layers=2, freq_dim=8, text_len=5, audio_dim=8, audio_inject_layers=(0, 1),
    text_dim=8,
)  # fmt: skip
FRAMES, TOKENS = 3, 4


def injector() -> AudioInjector:
    torch.manual_seed(0)
    plain = AudioInjector(CONFIG).requires_grad_(False)
    for attention in plain.injector:
        attention.attention = Attention()
    return plain


def audio(actors: int, seed: int = 1) -> AudioTokens:
    generator = torch.Generator().manual_seed(seed)
    shape = (actors, FRAMES)
    return AudioTokens(*(torch.randn(*shape, *rest, generator=generator) for rest in ((5, CONFIG.dim), (CONFIG.dim,))))


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("actors", [1, 2])
@torch.inference_mode()
def test_equals_the_models_own_bit_by_bit(actors, kept):
    plain = injector()
    fused, heard = FusedInjector(plain), audio(actors)
    masks = None if actors == 1 else torch.rand(actors, FRAMES, TOKENS, 1)
    x = torch.randn(FRAMES * TOKENS, CONFIG.dim)
    given = dataclasses.replace(heard, derived={} if kept else None)
    for _ in range(2):  # the second time from what was kept
        for index in (0, 1):
            expected = plain(x, heard, masks, index)
            assert torch.equal(joined(fused(x.clone(), given, masks, index)), expected)
    assert list(fused.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize(("dtype", "group"), [(torch.int8, 1), (torch.int8, 8), (torch.float8_e4m3fn, 1)])
@pytest.mark.parametrize("actors", [1, 2])
@torch.inference_mode()
def test_eight_bit_rows_are_made_once_for_all_that_read_them(actors, dtype, group):
    plain = injector()
    for name, linear in [(name, m) for name, m in plain.named_modules() if isinstance(m, torch.nn.Linear)]:
        weight, scale = quantize_rows(linear.weight, dtype, group=group)
        swap_linear(plain, name, dtype, group=group)
        new = plain.get_submodule(name)
        new.weight.data, new.weight_scale.data, new.bias.data = weight, scale[:, 0].contiguous(), linear.bias.data
    heard, x = dataclasses.replace(audio(actors), derived={}), torch.randn(FRAMES * TOKENS, CONFIG.dim)
    masks = None if actors == 1 else torch.rand(actors, FRAMES, TOKENS, 1)
    fused = FusedInjector(plain)
    for step in range(2):
        with trace_kernels() as expected_counts:
            expected = plain(x, heard, masks, 0) - x
        with trace_kernels() as counts:
            out = joined(fused(x.clone(), heard, masks, 0)) - x
        # A value that falls a step apart here and there: the rows' last bits differ.
        assert (out - expected).norm() / expected.norm() < 0.02
        calls, rows = (
            sum(n for (name, _), n in counts.items() if name == what) for what in ("linear_w8a8", "quantize_rows")
        )
        # Queries come in 8 bit from their norm; in the first step the modulation, and the keys and values together.
        assert (calls, rows) == ((5 * actors, 3 * actors) if step == 0 else (2 * actors, actors))
        assert sum(n for (name, _), n in expected_counts.items() if name == "quantize_rows") == 5 * actors


@torch.inference_mode()
def test_tensors_that_change_are_read_anew():
    plain = injector()
    fused, lane = FusedInjector(plain), audio(1)
    x = torch.randn(FRAMES * TOKENS, CONFIG.dim)
    fused(x.clone(), lane, None, 0)
    other = audio(1, seed=2)
    lane.frame.copy_(other.frame)
    lane.clip.copy_(other.clip)
    assert torch.equal(joined(fused(x.clone(), lane, None, 0)), plain(x, other, None, 0))
