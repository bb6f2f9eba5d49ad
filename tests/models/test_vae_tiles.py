import pytest
import torch

from lowvram_models.vae import StreamingVAE, build_vae
from lowvram_models.vae_tiles import Strip, strips


@pytest.fixture(scope="module")
def vae() -> StreamingVAE:
    torch.manual_seed(0)
    return StreamingVAE(build_vae(4))


def latents(frames: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(16, frames, height, width, generator=torch.Generator().manual_seed(1))


def test_strips_cover_a_side_once_and_have_margins():
    assert list(strips(40, 2)) == [Strip(0, 0, 20, 28), Strip(12, 20, 40, 40)]
    kept = [range(s.first, s.last) for s in strips(7, 3, margin=1)]
    assert [i for part in kept for i in part] == list(range(7))
    assert len(list(strips(2, 8))) == 2


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 6), (4, 9)])
def test_strips_whose_margins_reach_across_give_the_same_frames(vae, height, width):
    whole, cut = vae.start_decoder(), vae.start_decoder()
    cut.strips = 4
    latent = latents(2, height, width)
    assert torch.allclose(whole.decode(latent), cut.decode(latent), atol=1e-5)
    assert torch.allclose(whole.decode(latent), cut.decode(latent), atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(6, 40), (40, 6)])
def test_frames_are_near_those_of_the_whole(vae, height, width):
    whole, cut = vae.start_decoder(), vae.start_decoder()
    latent = latents(3, height, width)
    whole.prime(latent[:, :2])
    cut.prime(latent[:, :2])
    cut.strips = 2  # from here on: the cache of the whole is cut with the frame
    for _ in range(2):
        a, b = whole.decode(latent[:, 2:]), cut.decode(latent[:, 2:])
        assert a.shape == b.shape
        assert float((a - b).norm() / a.norm()) < 0.05
    shapes = [[getattr(slot, "shape", slot) for slot in d.state.slots] for d in (whole, cut)]
    assert shapes[0] == shapes[1]
