import pytest
import torch

from lowvram.schedule import Extent, blocks_of, clip_noise, frames_to_denoise, latent_frames_per_clip, ticks
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
    assert [b.slot for b in blocks] == [0, 1, 2] * 2


def test_noise_is_the_same_for_a_seed_and_differs_between_clips():
    shape = (16, 3, 4, 4)
    assert torch.equal(clip_noise(7, 1, shape), clip_noise(8, 0, shape))
    assert not torch.equal(clip_noise(7, 0, shape), clip_noise(7, 1, shape))


@pytest.mark.parametrize("wave", [1, 2, 3, 4, 9])
@pytest.mark.parametrize(("clips", "frames_per_clip"), [(1, 3), (3, 3), (1, 8), (3, 8), (2, 12)])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_every_step_comes_after_what_it_needs(clips, frames_per_clip, steps, wave):
    blocks = list(blocks_of(clips, frames_per_clip))
    done: set[tuple[int, int]] = set()
    refreshed_at = None
    for number, tick in enumerate(ticks(blocks, steps, wave)):
        assert 1 <= len(tick.items) <= wave
        if tick.refresh:
            assert refreshed_at is None
            refreshed_at = number
            # Nobody who reads the old sink is still under way, and its new frame is there.
            assert {(b.index, s) for b in blocks if b.clip == 0 for s in range(steps)} == done
        for block, step in tick.items:
            assert block.clip == 0 or refreshed_at is not None
            assert step == 0 or (block.index, step - 1) in done
            assert block.index == 0 or (block.index - 1, step) in done
            assert (step == 0) == (block is tick.starts)
        done |= {(block.index, step) for block, step in tick.items}
    assert done == {(block.index, step) for block in blocks for step in range(steps)}
    assert (refreshed_at is not None) == (clips > 1)


def test_blocks_finish_in_order():
    blocks = list(blocks_of(2, 12))
    finished = [tick.finished(4) for tick in ticks(blocks, 4, 4)]
    assert [block for block in finished if block] == blocks


def test_a_full_wave_takes_one_pass_a_block():
    passes = sum(1 for _ in ticks(blocks_of(10, 12), 4, 4))
    # A pass a block, and three that fill the wave at the start and again behind the sink's refresh.
    assert passes == 40 + 3 + 3
    assert sum(1 for _ in ticks(blocks_of(10, 12), 4, 1)) == 160


@pytest.mark.parametrize(
    ("voice", "clips", "num_clip", "expected"),
    [
        (45, 1, None, 48),  # all that is shown of a clip of 48 frames
        (46, 1, None, 60),  # a frame more, a block more
        (57, 1, None, 60),
        (58, 1, None, 72),
        (95, 1, None, 96),  # the whole of another clip, and no more: the reference would have made it a clip
        (95, 1, 1, 48),
        (95, 2, 1, 48),
        (10, 0, None, 24),
        (200, 4, 2, 96),
    ],
)
def test_as_many_frames_are_made_as_hold_the_voice(voice, clips, num_clip, expected):
    asked = dict(clips_in_audio=clips, infer_frames=48, num_clip=num_clip, dropped=3)
    assert frames_to_denoise(voice, **asked) == expected


@pytest.mark.parametrize(
    ("frames", "clips", "tail", "begun"),
    [(48, 1, 0, 1), (96, 2, 0, 2), (60, 1, 3, 2), (144, 3, 0, 3), (12, 0, 3, 1), (52, 1, 1, 2)],
)
def test_a_clip_is_begun_where_blocks_of_it_are_made(frames, clips, tail, begun):
    extent = Extent.of(frames, 48)
    assert (extent.clips, extent.tail, extent.clips_begun) == (clips, tail, begun)
    assert len({block.clip for block in extent.blocks()}) == begun
