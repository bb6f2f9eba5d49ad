import pytest
import torch

from lowvram.rings import KVRing, ring_window
from lowvram.rollout import blocks_of, clip_noise, cond_rope_distance, latent_frames_per_clip
from lowvram_kernels.errors import ConfigError


@pytest.mark.parametrize(("infer_frames", "latents"), [(12, 3), (24, 6), (32, 8), (48, 12), (80, 20)])
def test_latent_frames_of_a_clip(infer_frames, latents):
    assert latent_frames_per_clip(infer_frames) == latents == infer_frames // 4


@pytest.mark.parametrize("infer_frames", [0, 8, 13, 47, -12])
def test_frames_that_are_no_multiple_of_four(infer_frames):
    with pytest.raises(ConfigError, match="multiple of 4"):
        latent_frames_per_clip(infer_frames)


def test_a_remainder_makes_a_shorter_last_block():
    blocks = list(blocks_of(2, 8))
    assert [b.frames for b in blocks] == [3, 3, 2, 3, 3, 2]
    assert [b.first_frame for b in blocks] == [0, 3, 6, 8, 11, 14]
    assert [b.last_of_clip for b in blocks] == [False, False, True] * 2
    assert [b.index for b in blocks] == list(range(6))


def test_ring_windows_below_and_beyond_capacity():
    capacity, tokens = 8 * 10, 10
    windows = [ring_window(b.first_frame, b.frames, tokens, capacity) for b in blocks_of(2, 8)]
    assert [(w.start, w.length, w.visible) for w in windows] == [
        (0, 30, 30), (30, 30, 60), (60, 20, 80), (0, 30, 80), (30, 30, 80), (60, 20, 80),
    ]  # fmt: skip


def test_a_block_over_the_rings_end_is_refused():
    with pytest.raises(ValueError, match="runs over the end"):
        ring_window(7, 3, 10, 80)


def test_ring_keeps_what_was_written_and_shows_no_more():
    ring = KVRing(2, 8, 1, 2, torch.float32, torch.device("cpu"))
    new = torch.ones(3, 1, 2)
    keys, values = ring.extend(1, ring_window(0, 3, 1, 8), new, 2 * new)
    assert keys.shape == values.shape == (3, 1, 2)
    assert values.eq(2).all()
    assert not ring.keys[0].any()
    keys, _ = ring.extend(1, ring_window(3, 3, 1, 8), 5 * new, new)
    assert keys[:, 0, 0].tolist() == [1, 1, 1, 5, 5, 5]


def test_noise_is_the_same_for_a_seed_and_differs_between_clips():
    shape = (16, 3, 4, 4)
    assert torch.equal(clip_noise(7, 1, shape), clip_noise(8, 0, shape))
    assert not torch.equal(clip_noise(7, 0, shape), clip_noise(7, 1, shape))


def test_random_distance_is_seeded_and_in_range():
    drawn = [cond_rope_distance("random", 420, block, step) for block in range(50) for step in range(4)]
    assert drawn == [cond_rope_distance("random", 420, block, step) for block in range(50) for step in range(4)]
    assert set(drawn) == set(range(4, 31))
    assert cond_rope_distance(17, 420, 3, 2) == 17
