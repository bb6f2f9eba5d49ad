"""The fused audio injection against the models' own, bit by bit, and that its cache does not outlive what it is of."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lowvram.fused_audio import FusedInjector
from lowvram_kernels.modules import Attention
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
            assert torch.equal(fused(x.clone(), given, masks, index), expected)
    assert list(fused.state_dict()) == list(plain.state_dict())


@torch.inference_mode()
def test_tensors_that_change_are_read_anew():
    plain = injector()
    fused, lane = FusedInjector(plain), audio(1)
    x = torch.randn(FRAMES * TOKENS, CONFIG.dim)
    fused(x.clone(), lane, None, 0)
    other = audio(1, seed=2)
    lane.frame.copy_(other.frame)
    lane.clip.copy_(other.clip)
    assert torch.equal(fused(x.clone(), lane, None, 0), plain(x, other, None, 0))
