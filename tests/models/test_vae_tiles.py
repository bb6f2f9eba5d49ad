"""Frames decoded in strips are those of the whole: no seams, whatever the size and the number of strips."""

import pytest
import torch

from lowvram_models.vae import StreamingVAE, build_vae
from lowvram_models.vae_parts import decoder_tail
from lowvram_models.vae_tiles import MARGIN, Strip, strips

ROUNDING = 3e-6  # of convolutions in float32 that add in another order in another shape


@pytest.fixture(scope="module")
def vae() -> StreamingVAE:
    torch.manual_seed(0)
    return StreamingVAE(build_vae(4))


def latents(frames: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(16, frames, height, width, generator=torch.Generator().manual_seed(1))


def apart(whole: torch.Tensor, cut: torch.Tensor) -> float:
    """Relative norm of the difference; and no pixel is far off, as those of a seam would be."""
    assert whole.shape == cut.shape
    assert (whole - cut).abs().max() < 1e-4
    return float((whole - cut).norm() / whole.norm())


def test_strips_cover_a_side_once_and_have_margins():
    assert list(strips(40, 2)) == [Strip(0, 0, 20, 20 + MARGIN), Strip(20 - MARGIN, 20, 40, 40)]
    kept = [range(s.first, s.last) for s in strips(7, 3, margin=1)]
    assert [i for part in kept for i in part] == list(range(7))
    assert len(list(strips(2, 8))) == 2


@pytest.mark.parametrize(
    ("height", "width", "count"),
    [(8, 8, 4), (4, 9, 3), (6, 40, 2), (40, 6, 2), (5, 37, 3), (31, 7, 5), (3, 33, 8), (2, 2, 8)],
)
def test_strips_give_the_frames_of_the_whole(vae, height, width, count):
    whole, cut = vae.start_decoder(), vae.start_decoder()
    latent = latents(4, height, width)
    whole.prime(latent[:, :2])
    cut.prime(latent[:, :2])
    cut.strips = count  # from here on: the cache of the whole is cut with the frame
    assert apart(whole.decode(latent[:, 2:]), cut.decode(latent[:, 2:])) < ROUNDING
    assert apart(whole.decode(latent[:, :2]), cut.decode(latent[:, :2])) < ROUNDING
    shapes = [[getattr(slot, "shape", slot) for slot in d.state.slots] for d in (whole, cut)]
    assert shapes[0] == shapes[1]
    cut.strips = 1  # and the cache that strips leave is that of the whole
    assert apart(whole.decode(latent[:, 1:]), cut.decode(latent[:, 1:])) < ROUNDING


@pytest.mark.parametrize("count", [2, 3])
def test_a_video_begun_in_strips_is_that_of_the_whole(vae, count):
    whole, cut = vae.start_decoder(latents_per_call=2), vae.start_decoder(latents_per_call=2)
    cut.strips = count
    latent = latents(4, 5, 24)
    assert apart(whole.decode(latent), cut.decode(latent)) < ROUNDING


@pytest.mark.parametrize(("margin", "reached"), [(MARGIN, False), (MARGIN - 1, True)])
def test_a_margin_is_as_wide_as_convolutions_look_and_no_wider(vae, margin, reached):
    """What lies further from a strip than the margin does not reach its pixels, not by a bit."""
    torch.manual_seed(2)
    decoder, first = vae.vae.decoder, 9
    seen = torch.randn(1, 16, 2, 3, 2 * first)
    changed = seen.clone()
    changed[..., : first - margin] = 3 * torch.randn(1, 16, 2, 3, first - margin)
    with torch.inference_mode():
        found = [decoder_tail(decoder, x, [None] * 32, [0])[..., 8 * first :] for x in (seen, changed)]
    assert torch.equal(*found) is not reached
