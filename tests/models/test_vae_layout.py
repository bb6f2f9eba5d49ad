"""Channels last: what convolutions of the VAE are given lies pixel by pixel, and nothing is turned round in between."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowvram_models.vae import StreamingVAE, build_vae
from lowvram_models.vae_order import channels_last

aten = torch.ops.aten
CONVOLUTIONS = (aten.convolution.default, aten.mkldnn_convolution.default)
# What makes a tensor of the same values elsewhere.
COPIES = (aten.clone.default, aten._to_copy.default, aten.copy_.default, aten.stack.default, aten.cat.default)


def last(x: torch.Tensor) -> torch.memory_format:
    return torch.channels_last if x.ndim == 4 else torch.channels_last_3d


def pixel_by_pixel(x: torch.Tensor) -> bool:
    return x.is_contiguous(memory_format=last(x))


def order(x: torch.Tensor) -> list[int]:
    """Dimensions of more than one element, the widest steps first."""
    return sorted((d for d in range(x.ndim) if x.shape[d] > 1), key=x.stride, reverse=True)


class Layouts(TorchDispatchMode):
    """``turned`` are copies into another order, each as its operation and shape; ``wrong`` are tensors of convolutions
    that are not channels-last; ``convolutions`` counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.turned: list[tuple[str, tuple[int, ...]]] = []
        self.wrong: list[tuple[int, ...]] = []
        self.convolutions = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in CONVOLUTIONS:
            self.convolutions += 1
            self.wrong += [tuple(t.shape) for t in (args[0], args[1], out) if not pixel_by_pixel(t)]
        elif func in COPIES:
            source = args[1] if func is aten.copy_.default else args[0]
            parts = [t for t in tree_leaves(source) if isinstance(t, torch.Tensor) and t.ndim == out.ndim > 2]
            if any(order(part) != [d for d in order(out) if part.shape[d] > 1] for part in parts):
                self.turned.append((func.__name__, tuple(out.shape)))
        return out


@pytest.fixture(scope="module")
def vae() -> StreamingVAE:
    torch.manual_seed(0)
    return StreamingVAE(build_vae(8))


def latents(frames: int) -> torch.Tensor:
    return torch.randn(16, frames, 4, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("strips", [1, 2])
@pytest.mark.parametrize("latents_per_call", [1, 2])
def test_a_block_is_decoded_without_a_copy_into_another_order(vae, latents_per_call, strips):
    decoder = vae.start_decoder(latents_per_call=latents_per_call)
    decoder.prime(latents(3))
    decoder.strips = strips
    with Layouts() as seen:
        frames = decoder.decode(latents(2))
    calls = 2 // latents_per_call
    tail = calls * strips  # what is behind the first upsampling runs once a strip
    assert seen.wrong == []
    assert seen.convolutions >= 30 * tail
    # Latents come channel by channel, and the two frames that a temporal upsampling makes of one are channels of it.
    come = [shape for _, shape in seen.turned if shape[1] == 16]
    interleaved = [shape for _, shape in seen.turned if len(shape) == 6]
    assert len(come) == calls
    assert len(interleaved) == 2 * tail
    assert len(seen.turned) == len(come) + len(interleaved)
    assert frames.permute(1, 2, 3, 0).is_contiguous()  # as pixels are written


def test_a_portrait_is_encoded_without_a_copy_into_another_order(vae):
    video = torch.rand(3, 9, 32, 48)
    with Layouts() as seen:
        vae.encode(video)
    assert seen.wrong == []
    # The video, chunk by chunk; and the latents, which are joined channel by channel as they are denoised.
    assert [shape[:2] for _, shape in seen.turned] == [(1, 3)] * 3 + [(16, 3)]


@pytest.mark.parametrize("shape", [(1, 8, 1, 4, 6), (1, 8, 2, 1, 6), (2, 8, 3, 4, 1), (1, 8, 4, 6), (3, 1, 2, 2)])
def test_channels_last_is_what_pytorch_takes_for_it(shape):
    """Steps of dimensions of one element too, by which PyTorch chooses the order of what it makes."""
    x = torch.randn(shape).transpose(0, 1).contiguous().transpose(0, 1)  # whatever order
    ordered = channels_last(x)
    assert torch.equal(ordered, x)
    assert ordered.stride() == torch.empty(shape, memory_format=last(x)).stride()
    assert channels_last(ordered) is ordered


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_block_keeps_its_order_on_the_gpu():
    vae = StreamingVAE(build_vae(8).to("cuda", torch.bfloat16), dtype=torch.bfloat16)
    decoder = vae.start_decoder()
    decoder.prime(latents(3).cuda())
    with Layouts() as seen:
        decoder.decode(latents(1).cuda())
    assert seen.wrong == []
    assert len(seen.turned) == 3
