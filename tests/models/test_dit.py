import pytest
import torch

from lowvram_models.audio_adapter import AudioEncoder
from lowvram_models.config import DiTConfig
from lowvram_models.dit import CausalDiT, FramePacker

CONFIG = DiTConfig(
    dim=32, ffn_dim=48, num_heads=2, num_layers=2, freq_dim=8, text_len=6, text_dim=12, audio_dim=10,
    audio_inject_layers=(1,),
)  # fmt: skip


def test_text_longer_than_the_model_takes_is_refused():
    with pytest.raises(ValueError, match="takes 6 at most"):
        CausalDiT(CONFIG).embed_text(torch.zeros(7, 12))


def test_patches_come_back_in_the_order_of_their_tokens():
    dit = CausalDiT(CONFIG)
    tokens = torch.arange(2 * 3 * 4 * 64, dtype=torch.float32).view(24, 64)
    out = dit.unpatchify(tokens, (2, 3, 4))
    assert out.shape == (16, 2, 6, 8)
    # token (frame 1, row 2, column 3), patch position (1, 0), channel 5
    assert out[5, 1, 5, 6] == tokens[12 + 2 * 4 + 3, 2 * 16 + 5]


@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_audio_tokens_follow_the_block(frames):
    tokens = AudioEncoder(CONFIG)(torch.randn(2, 25, 10, 4 * frames))
    assert tokens.frame.shape == (2, frames, 5, 32)
    assert tokens.clip.shape == (2, frames, 32)


def test_audio_of_a_shape_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="4 \\* frames"):
        AudioEncoder(CONFIG)(torch.zeros(1, 25, 10, 7))


def test_frame_packer_wants_19_frames():
    packer = FramePacker(16, 32)
    assert packer(torch.zeros(16, 19, 16, 8)).shape == (32 + 8 + 4 * 2, 32)
    with pytest.raises(ValueError, match="expected 19"):
        packer(torch.zeros(16, 18, 16, 8))
