from __future__ import annotations

import pytest

from lowvram.media.sizes import output_size
from lowvram.planning import Workload
from lowvram_kernels.errors import ConfigError, InputError
from lowvram_models.rope import condition_rope


@pytest.mark.parametrize(
    ("size", "latents", "tokens"),
    [
        ("384*256", (32, 48), 1152),
        ("704*384", (48, 88), 3168),
        ("720*400", (50, 90), 3375),
        ("1280*720", (90, 160), 10800),
    ],
)
def test_a_size_is_taken_as_it_is(size, latents, tokens):
    work = Workload.of_size(size)
    assert (work.latent_size, work.block_tokens) == (latents, tokens)
    assert work.ring_tokens == 4 * tokens


def test_no_portrait_makes_more_of_a_size():
    for size in ("704*384", "720*400", "1280*720"):
        planned = Workload.of_size(size).pixels
        for shape in ((512, 512), (1024, 768), (400, 720), (1500, 900)):
            height, width = output_size(size, *shape)
            assert height * width <= planned


@pytest.mark.parametrize("latents", [(48, 88), (50, 90), (32, 32), (90, 160)])
def test_the_sink_has_the_tokens_that_its_rotations_have(latents):
    work = Workload(latent_size=latents)
    assert work.sink_tokens == len(condition_rope(latents[0] // 2, latents[1] // 2, 12).cos)


def test_a_remainder_makes_one_more_block():
    work = Workload(latent_size=(48, 88), infer_frames=32)
    assert (work.frames_per_clip, work.frames_per_block, work.blocks_per_clip) == (8, 3, 3)
    assert work.ring_tokens == 8 * work.tokens_per_frame


def test_what_cannot_be_made_is_refused():
    with pytest.raises(ConfigError, match="infer_frames is 13"):
        Workload(latent_size=(48, 88), infer_frames=13)
    with pytest.raises(ConfigError, match="sample_steps is 0"):
        Workload(latent_size=(48, 88), sample_steps=0)
    with pytest.raises(ConfigError, match="too small"):
        Workload(latent_size=(4, 88))
    with pytest.raises(InputError, match="unknown size"):
        Workload.of_size("large")
