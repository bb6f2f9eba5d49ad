"""One pass of training computes what the rollout's rings do, block by block and step by step."""

from __future__ import annotations

import pytest
import torch

from lowvram.denoise.rollout import Rollout, RolloutSettings
from lowvram.offload.copy_engine import Engine
from lowvram.offload.placement import Placement
from lowvram.schedule import blocks_of
from lowvram_models.config import DiTConfig
from lowvram_models.dit import CausalDiT
from training.tiny_face.causal import Conditions, velocity

STEPS = 4


class Present:
    """All layers are there already."""

    def __init__(self, count: int):
        self.count = count

    def place(self, streamed, slots):
        assert not streamed

    def enter(self, layer):
        pass

    leave = enter


@pytest.fixture(scope="module")
def dit() -> CausalDiT:
    torch.manual_seed(0)
    config = DiTConfig(
        dim=32, ffn_dim=48, num_heads=2, num_layers=2, freq_dim=16, text_len=6, text_dim=8, audio_dim=5,
        audio_inject_layers=(0,), audio_layers=3,
    )  # fmt: skip
    model = CausalDiT(config).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith(("modulation", "padding_tokens")):
            parameter.normal_(0, 0.3)
    return model


# Latent frames: of a clip, and of the last one; a ring holds one clip's blocks.
@pytest.mark.parametrize(
    ("per_clip", "clips", "tail", "seed"),
    [(12, 1, 0, 1), (12, 2, 0, 2), (6, 3, 0, 3), (3, 4, 0, 4), (9, 2, 3, 5), (5, 1, 0, 6), (9, 1, 6, 7)],
)
def test_equals_the_rollout(dit, per_clip, clips, tail, seed):
    torch.manual_seed(seed)
    h, w = 8, 12
    frames = per_clip * clips + tail
    given = Conditions(
        reference=torch.randn(16, 1, h, w),
        motion=torch.randn(16, 19, h, w),
        context=torch.randn(4, 8),
        audio=torch.randn(1, 3, 5, 4 * frames),
    )
    settings = RolloutSettings(frames_per_clip=per_clip, latent_size=(h, w), sample_steps=STEPS)
    told: dict[int, list[torch.Tensor]] = {step: [] for step in range(STEPS)}
    before: dict[int, list[torch.Tensor]] = {step: [] for step in range(STEPS)}
    rollout = Rollout(
        dit,
        Present(dit.config.num_layers),
        given.context,
        settings,
        dtype=torch.float32,
        engine=Engine(torch.device("cpu")),
        placement=Placement(),
        on_prediction=lambda block, step, velocity: told[step].append(velocity.clone()),
    )
    rollout.prefill(given.reference, given.motion)
    for block in blocks_of(clips, per_clip, tail=tail):
        here = slice(4 * block.first_frame, 4 * (block.first_frame + block.frames))
        rollout.start(block, torch.randn(16, block.frames, h, w), given.audio[..., here])
        for step in range(STEPS):
            before[step].append(rollout.latents()[block.index])
            rollout.advance([(block, step)])
        rollout.finish(block)
    ring = -(-per_clip // 3)
    for step, timestep in enumerate(rollout.scheduler.timesteps.tolist()):
        noisy = torch.cat(before[step], dim=1)
        found = velocity(dit, noisy, timestep, given, first_frame=0, ring=ring)
        torch.testing.assert_close(found, torch.cat(told[step], dim=1), atol=2e-5, rtol=1e-4)


def test_what_a_later_block_is_changes_no_earlier_one(dit):
    torch.manual_seed(8)
    given = Conditions(
        reference=torch.randn(16, 1, 8, 8),
        motion=torch.randn(16, 19, 8, 8),
        context=torch.randn(4, 8),
        audio=torch.randn(1, 3, 5, 24),
    )
    one = torch.randn(16, 6, 8, 8)
    other = torch.cat([one[:, :3], torch.randn(16, 3, 8, 8)], dim=1)
    found = [velocity(dit, noisy, 600.0, given, first_frame=9) for noisy in (one, other)]
    assert torch.equal(found[0][:, :3], found[1][:, :3])
    assert not torch.allclose(found[0][:, 3:], found[1][:, 3:])
