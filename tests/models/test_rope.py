import pytest
import torch

from lowvram_models.rope import apply_rope, block_rope, condition_rope, inverse_frequencies, reference_time


@pytest.mark.parametrize(("head_dim", "time", "space"), [(128, 22, 21), (16, 4, 2), (32, 6, 5)])
def test_pairs_are_shared_out(head_dim, time, space):
    t, s = inverse_frequencies(head_dim)
    assert (len(t), len(s)) == (time, space)
    assert time + 2 * space == head_dim // 2


def test_rotation_is_complex_multiplication():
    x, rope = torch.randn(6, 2, 16), block_rope(5, 1, 2, 3, 16)
    expected = torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * torch.complex(rope.cos, rope.sin)[:, None]
    assert torch.allclose(apply_rope(x, rope).double(), torch.view_as_real(expected).flatten(-2), atol=1e-6)


def test_scores_depend_on_distance_only():
    """The product of a rotated query and key is the same wherever in the video both stand."""
    q, k = torch.randn(1, 1, 16), torch.randn(1, 1, 16)

    def score(frame: int) -> torch.Tensor:
        here, there = block_rope(frame, 1, 1, 1, 16), block_rope(frame + 7, 1, 1, 1, 16)
        return (apply_rope(q, here) * apply_rope(k, there)).sum()

    assert torch.allclose(score(0), score(10_000), atol=1e-4)


def test_condition_tokens_and_their_places():
    rope = condition_rope(8, 12, 16)
    assert rope.cos.shape == (96 + 96 + 24 + 4 * 6, 8)
    time0 = torch.atan2(rope.sin[:, 0], rope.cos[:, 0])
    expected = torch.tensor([30.0, -1.0, -3.0, -19.0, -4.0])
    turned = time0[torch.tensor([0, 96, 192, 216, 234])]
    assert torch.allclose(turned, torch.remainder(expected + torch.pi, 2 * torch.pi) - torch.pi, atol=1e-5)


@pytest.mark.parametrize(
    ("frame", "distance", "time"), [(0, 30, 30), (5, 30, 35), (12, 17, 30), (20, 17, 37), (40, 4, 44)]
)
def test_reference_moves_with_the_video(frame, distance, time):
    assert reference_time(frame, distance) == time
