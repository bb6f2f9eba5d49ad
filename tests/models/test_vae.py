"""The VAE as a stream: golden latents and frames, and that streaming changes no value and holds no memory."""

import gc
from functools import cache
from types import MethodType

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from PIL import Image
from torch import nn

from lowvram_models.constants import DROPPED_FIRST_FRAMES, PRIMING_LATENTS
from lowvram_models.vae import EncoderState, StreamingVAE, build_vae
from lowvram_models.vae_layers import CausalConv3d, conv3d
from tests.golden_cases import cases, relative_error

each_case = pytest.mark.parametrize("case", cases("pipeline"), ids=lambda case: case.folder.name)


@cache
def tiny_vae():
    torch.manual_seed(0)
    vae = build_vae(8)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.copy_(torch.randn_like(parameter) * parameter[0].numel() ** -0.5 if parameter.ndim > 3 else 1.0)
    return StreamingVAE(vae)


def random_latent(num_latents, seed=0, size=(4, 6)):
    return torch.randn(16, num_latents, *size, generator=torch.Generator().manual_seed(seed))


def random_frame(size=(32, 48)):
    return torch.rand(3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1


# --- golden cases


def golden_vae(case):
    tensors = torch.load(case.folder / "ckpt/Wan2.2-S2V-14B/Wan2.1_VAE.pth", weights_only=True)
    vae = build_vae(tensors["encoder.conv1.weight"].shape[0])
    vae.load_state_dict(convert_wan_vae_to_diffusers(dict(tensors)))
    return StreamingVAE(vae)


def golden_portrait(case):
    height, width = case.settings["height"], case.settings["width"]
    image = Image.open(case.folder / "inputs/portrait.png").convert("RGB")
    scale = min(height, width) / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    pixels = np.asarray(image.crop((left, top, left + width, top + height)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1


@pytest.mark.golden
@each_case
def test_latents_of_the_portrait_meet_the_golden_ones(case):
    # A float64 run differs from the golden motion latents by 1.0e-6, which is float32's own rounding there.
    expected, vae, portrait = case.tensors("outputs"), golden_vae(case), golden_portrait(case)
    assert relative_error(vae.encode(portrait[:, None]), expected["ref_latents"][0]) < 2e-6
    assert relative_error(vae.encode_repeated(portrait), expected["motion_latents"][0]) < 2e-6


@pytest.mark.golden
@each_case
def test_streamed_frames_meet_the_golden_ones(case):
    expected = case.tensors("outputs")
    decoder = golden_vae(case).start_decoder(latents_per_call=3)
    decoder.prime(expected["motion_latents"][0, :, :PRIMING_LATENTS])
    frames = torch.cat([decoder.decode(block) for block in expected["latents"]], dim=1)[:, DROPPED_FIRST_FRAMES:]
    assert frames.shape[1] == len(expected["frame_mean"])
    assert (frames[:, :9] - expected["frames_first9"].float()).abs().mean() < 1e-4
    assert (frames[:, -12:] - expected["frames_last12"].float()).abs().mean() < 1e-4
    assert (frames.mean((0, 2, 3)) - expected["frame_mean"]).abs().max() < 1e-5
    assert (frames.std((0, 2, 3)) - expected["frame_std"]).abs().max() < 1e-5


# --- the network


def test_meta_vae_has_the_library_s_names_and_shapes():
    with torch.device("meta"):
        ours, theirs = build_vae(96), AutoencoderKLWan(base_dim=96)
    assert all(parameter.is_meta for parameter in ours.parameters())
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    latent = random_latent(1)
    assert StreamingVAE(ours).normalise(latent).device == latent.device


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 4e-2)])
def test_lighter_layers_compute_what_the_library_s_do(dtype, tolerance):
    library = AutoencoderKLWan(base_dim=8).eval()
    library.load_state_dict(tiny_vae().vae.state_dict())
    ours = build_vae(8)
    ours.load_state_dict(library.state_dict())
    streaming = StreamingVAE(ours.to(dtype), dtype=dtype)
    video, latent = random_frame()[:, None].repeat(1, 9, 1, 1).cumsum(1).sin(), random_latent(3)
    with torch.no_grad():
        expected_latent = library.encode(video[None]).latent_dist.mode()[0]
        expected_frames = library.decode(streaming.denormalise(latent)[None]).sample[0]
    encoded, frames = streaming.encode(video), streaming.start_decoder().decode(latent)
    assert encoded.dtype == frames.dtype == torch.float32
    assert relative_error(streaming.denormalise(encoded), expected_latent) < tolerance
    assert relative_error(frames, expected_frames) < tolerance


@pytest.mark.parametrize(("stride", "padding"), [((1, 1, 1), (0, 1, 1)), ((2, 1, 1), (0, 0, 0))])
def test_conv3d_is_that_of_torch(stride, padding):
    x, weight, bias = torch.randn(1, 4, 5, 6, 7), torch.randn(3, 4, 3, 3, 3), torch.randn(3)
    expected = nn.functional.conv3d(x.double(), weight.double(), bias.double(), stride, padding)
    assert relative_error(conv3d(x, weight, bias, stride=stride, padding=padding), expected) < 1e-6


def test_integer_weights_run_where_conv_forward_is_replaced():
    plain, quantized = build_vae(8), build_vae(8)
    plain.load_state_dict(tiny_vae().vae.state_dict())
    quantized.load_state_dict(tiny_vae().vae.state_dict())
    convs = zip(plain.modules(), quantized.modules(), strict=True)
    for conv, target in ((a, b) for a, b in convs if isinstance(a, CausalConv3d)):
        scale = conv.weight.abs().amax((1, 2, 3, 4), keepdim=True) / 127
        integers = (conv.weight / scale).round().to(torch.int8)
        conv.weight.copy_(integers * scale)

        def dequantize(self, x, weight, bias, scale=scale):
            return nn.functional.conv3d(x, weight.to(x.dtype) * scale, bias, self.stride, self.padding)

        target.weight = nn.Parameter(integers, requires_grad=False)
        target._conv_forward = MethodType(dequantize, target)
    expected, actual = StreamingVAE(plain), StreamingVAE(quantized)
    latent = random_latent(2)
    assert relative_error(actual.start_decoder().decode(latent), expected.start_decoder().decode(latent)) < 1e-5
    frame = random_frame()
    assert relative_error(actual.encode_repeated(frame, 5), expected.encode_repeated(frame, 5)) < 1e-5


# --- encoding


@pytest.mark.parametrize("num_frames", [1, 5, 73])
def test_repeated_frame_is_encoded_as_its_video(num_frames):
    frame = random_frame()
    repeated = tiny_vae().encode_repeated(frame, num_frames)
    assert repeated.shape == (16, 1 + num_frames // 4, 4, 6)
    assert torch.equal(repeated, tiny_vae().encode(frame[:, None].expand(-1, num_frames, -1, -1)))


def test_settled_stages_of_a_repeated_frame_are_not_run_again():
    encoder = tiny_vae().vae.encoder
    calls = {"first block": 0, "last convolution": 0}

    def count(name):
        calls[name] += 1

    hooks = [
        encoder.down_blocks[0].register_forward_hook(lambda *_: count("first block")),
        encoder.conv_out.register_forward_hook(lambda *_: count("last convolution")),
    ]
    tiny_vae().encode_repeated(random_frame(), 73)
    for hook in hooks:
        hook.remove()
    assert calls == {"first block": 4, "last convolution": 19}


def test_encoder_cache_owns_its_storage():
    state = EncoderState.empty(tiny_vae()._stages)
    with torch.no_grad():
        for chunk in (random_frame()[:, None], random_frame()[:, None].repeat(1, 4, 1, 1)):
            tiny_vae()._encode_chunk(chunk, state)
    cached = [slot for slots in state.slots for slot in slots]
    assert all(slot.untyped_storage().nbytes() == slot.numel() * 4 for slot in cached)


def test_normalise_and_denormalise_are_inverse():
    latent = random_latent(2)
    config = tiny_vae().vae.config
    normalised = tiny_vae().normalise(latent)
    assert torch.allclose(normalised[3], (latent[3] - config.latents_mean[3]) / config.latents_std[3])
    assert torch.allclose(tiny_vae().denormalise(normalised), latent, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "message"), [((3, 4, 32, 32), "4n"), ((3, 5, 30, 32), "multiples"), ((1, 1, 32, 32), r"\[3, T, H, W\]")]
)
def test_videos_of_other_shapes_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        tiny_vae().encode(torch.zeros(shape))


def test_repeating_a_frame_a_wrong_number_of_times_is_refused():
    with pytest.raises(ValueError, match="4n"):
        tiny_vae().encode_repeated(random_frame(), 72)


# --- decoding


@pytest.mark.parametrize("latents_per_call", [1, 2, 3])
def test_blocks_decode_as_their_concatenation(latents_per_call):
    latent = random_latent(8)
    whole = tiny_vae().start_decoder().decode(latent)
    decoder = tiny_vae().start_decoder(latents_per_call=latents_per_call)
    blocks = [decoder.decode(block) for block in latent.split(3, dim=1)]
    assert [block.shape[1] for block in blocks] == [9, 12, 8]
    assert relative_error(torch.cat(blocks, dim=1), whole) < 5e-6


def test_priming_is_decoding_without_frames():
    latent = random_latent(10)
    decoder = tiny_vae().start_decoder()
    assert decoder.prime(latent[:, :7]) is None
    frames = decoder.decode(latent[:, 7:])
    assert frames.shape == (3, 12, 32, 48)
    assert relative_error(frames, tiny_vae().start_decoder().decode(latent)[:, -12:]) < 5e-6
    unprimed = tiny_vae().start_decoder().decode(latent[:, 7:])
    assert relative_error(frames[:, -9:], unprimed) > 1e-2


def test_decoders_do_not_share_their_cache():
    first, second = tiny_vae().start_decoder(), tiny_vae().start_decoder()
    latents, others = random_latent(4), random_latent(4, seed=7)
    alternating = []
    for index in range(4):
        alternating.append(first.decode(latents[:, index : index + 1]))
        second.decode(others[:, index : index + 1])
    assert torch.equal(torch.cat(alternating, dim=1), tiny_vae().start_decoder().decode(latents))


def test_memory_does_not_grow_with_the_blocks_decoded():
    decoder = tiny_vae().start_decoder(latents_per_call=3)

    def live_bytes_after(num_blocks):
        for seed in range(num_blocks):
            decoder.decode(random_latent(3, seed))
        gc.collect()
        tensors = (t for t in gc.get_objects() if type(t) is torch.Tensor and t.layout is torch.strided)
        storages = {t.untyped_storage() for t in tensors}
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()), decoder.state.nbytes()

    assert live_bytes_after(2) == live_bytes_after(10)
    tensors = [slot for slot in decoder.state.slots if isinstance(slot, torch.Tensor)]
    assert decoder.state.nbytes() == sum(slot.numel() * slot.element_size() for slot in tensors) > 0


def test_frames_are_clamped():
    frames = tiny_vae().start_decoder().decode(random_latent(2) * 1000)
    assert frames.abs().max() == 1.0


def test_decoder_refuses_what_it_cannot_continue():
    decoder = tiny_vae().start_decoder()
    decoder.decode(random_latent(1))
    with pytest.raises(ValueError, match="prime a new one"):
        decoder.prime(random_latent(7))
    with pytest.raises(ValueError, match="expected 1 or more"):
        tiny_vae().start_decoder(latents_per_call=0)


@pytest.mark.parametrize("shape", [(16, 4, 6), (4, 1, 4, 6), (16, 0, 4, 6)])
def test_latents_of_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected \[16, k, h, w\]"):
        tiny_vae().start_decoder().decode(torch.zeros(shape))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_the_gpu_is_near_float32_on_the_cpu(dtype):
    vae = build_vae(8)
    vae.load_state_dict(tiny_vae().vae.state_dict())
    streaming = StreamingVAE(vae.to("cuda", dtype), dtype=dtype)
    latent, frame = random_latent(3), random_frame()
    frames = streaming.start_decoder().decode(latent.cuda()).cpu()
    assert relative_error(frames, tiny_vae().start_decoder().decode(latent)) < 4e-2
    encoded = streaming.encode_repeated(frame.cuda(), 9).cpu()
    assert relative_error(encoded, tiny_vae().encode_repeated(frame, 9)) < 4e-2
