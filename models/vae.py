"""The causal 3D VAE as a stream: video in chunks to latents, latents in blocks to frames, memory bounded by one chunk.

The network is diffusers' ``AutoencoderKLWan`` with the published weights (Wan 2.1, base width 96, 16 latent channels).
Its convolutions look back in time only, so a chunk needs just the last two inputs of every convolution: the causal
cache. Here that cache lies in explicit state objects and lives from call to call, where the library drops it after
each video. One latent frame stands for 4 video frames, except the first of a video, which stands for one.

Everything is unbatched: video is [3, T, H, W] in [-1, 1], latents are [16, T_lat, H/8, W/8] and normalised by the
per-channel mean and standard deviation of the VAE's config.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor, nn

from lowvram_models.constants import FRAMES_PER_LATENT, MOTION_FRAMES, PIXELS_PER_LATENT
from lowvram_models.vae_layers import Slot, lighten
from lowvram_models.vae_order import channels_last
from lowvram_models.vae_parts import EncoderStage, decoder_head, decoder_tail, encoder_stages, num_slots
from lowvram_models.vae_tiles import decode_in_strips


def build_vae(base_dim: int = 96) -> AutoencoderKLWan:
    """Construct the VAE in eval mode without gradients; weights are random, or absent under ``torch.device("meta")``.

    ``base_dim`` is the number of rows of the published ``encoder.conv1.weight`` (96; tiny checkpoints have fewer).
    Parameter names and the function are those of the library; ``vae_layers`` computes it at less cost.
    """
    vae = AutoencoderKLWan(base_dim=base_dim)
    lighten(vae)
    return vae.eval().requires_grad_(False)


class StreamingVAE:
    """Encoder and streaming decoder around one ``AutoencoderKLWan``.

    ``dtype`` is what the network computes in. It is said here and never read from the weights, because quantized
    convolutions hold integers. Inputs are cast to it; latents and frames come back in float32. The VAE and the inputs
    have to be on the same device.

    Everything between is channels-last, the convolutions' weights too: those that do not lie so yet are copied here.
    Measured on one core of an AMD EPYC with AVX2, that takes 0.77 of the time at base width 8 and 256 x 384 pixels.
    """

    def __init__(self, vae: AutoencoderKLWan, *, dtype: torch.dtype = torch.float32) -> None:
        self.vae = vae
        self.dtype = dtype
        # Real numbers even where the VAE was built under a "meta" context.
        self._mean = torch.tensor(vae.config["latents_mean"], dtype=torch.float32, device="cpu").view(-1, 1, 1, 1)
        self._std = torch.tensor(vae.config["latents_std"], dtype=torch.float32, device="cpu").view(-1, 1, 1, 1)
        self._stages = encoder_stages(vae.encoder)
        # What ``lowvram_quantize`` stores, and the loader puts in its order, is in it already.
        for module in vae.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d) and not module.weight.is_meta:
                module.weight.data = channels_last(module.weight.data)

    def normalise(self, latent: Tensor) -> Tensor:
        """The encoder's own latent [16, T_lat, h, w] as (latent - mean) / std, float32."""
        return (latent.float() - self._mean.to(latent.device)) / self._std.to(latent.device)

    def denormalise(self, latent: Tensor) -> Tensor:
        """The inverse of ``normalise``: latent * std + mean, float32."""
        return latent.float() * self._std.to(latent.device) + self._mean.to(latent.device)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Encode video [3, T, H, W] in [-1, 1] to normalised latents [16, 1 + (T-1)/4, H/8, W/8], float32.

        Raises ValueError unless T = 4n + 1 and H, W are multiples of 8.
        """
        _check_video(video.shape)
        state = EncoderState.empty(self._stages)
        latents = [self._encode_chunk(video[:, :1], state)]
        for start in range(1, video.shape[1], FRAMES_PER_LATENT):
            latents.append(self._encode_chunk(video[:, start : start + FRAMES_PER_LATENT], state))
        return self.normalise(torch.cat(latents, dim=1))

    @torch.no_grad()
    def encode_repeated(self, frame: Tensor, num_frames: int = MOTION_FRAMES) -> Tensor:
        """Encode one image [3, H, W] shown for ``num_frames`` frames: the latents ``encode`` gives for that video.

        The video is never made. Once neither the input nor the cache of a stage changes from chunk to chunk, its
        output cannot change any more either and the stage is not run again: of 73 frames the stages at full and half
        resolution, which cost most, compute 9 to 25. Nothing is assumed about how far a stage looks back; its cache
        is compared bit by bit.

        Raises ValueError as ``encode`` does.
        """
        _check_video((frame.shape[0], num_frames, *frame.shape[1:]))
        state = EncoderState.empty(self._stages)
        latents = [self._encode_chunk(frame[:, None], state)]
        # What the first stage that still changes gets in every later chunk.
        constant = channels_last(frame[None, :, None].to(self.dtype).expand(-1, -1, FRAMES_PER_LATENT, -1, -1))
        for _ in range((num_frames - 1) // FRAMES_PER_LATENT):
            constant, moments = self._encode_constant(constant, state)
            latents.append(self._latent(moments))
        return self.normalise(torch.cat(latents, dim=1))

    def start_decoder(self, *, latents_per_call: int = 1) -> StreamingDecoder:
        """A decoder with an empty cache; see ``StreamingDecoder``."""
        return StreamingDecoder(self, latents_per_call=latents_per_call)

    def _encode_chunk(self, chunk: Tensor, state: EncoderState) -> Tensor:
        """One chunk [3, 1 or 4, H, W] to one latent frame [16, 1, h, w], not normalised; updates ``state``."""
        x = channels_last(chunk[None].to(self.dtype))
        for stage, slots in zip(self._stages, state.slots, strict=True):
            x = stage.run(x, slots)
            _own_storage(slots)
        return self._latent(x)

    def _encode_constant(self, constant: Tensor, state: EncoderState) -> tuple[Tensor, Tensor]:
        """One more chunk of an unchanging video through the stages that are not settled yet; updates ``state``.

        Returns the input of the first stage that is still not settled, and the chunk's moments [1, 32, 1, h, w].
        """
        x = constant
        for index in range(state.num_settled, len(self._stages)):
            slots = state.slots[index]
            before = list(slots)
            x = self._stages[index].run(x, slots)
            _own_storage(slots)
            if index == state.num_settled and _same_slots(before, slots):
                state.num_settled += 1
                state.slots[index] = []
                constant = x
        return constant, x

    def _latent(self, moments: Tensor) -> Tensor:
        """The latent distribution's mode, which is its mean: the first half of the channels."""
        return self.vae.quant_conv(moments)[0].chunk(2)[0]


class StreamingDecoder:
    """Turns latents into frames block by block, with the causal cache kept from block to block.

    The cache is the only state: decoding blocks one after another gives the frames that decoding their concatenation
    gives. The very first latent frame it sees stands for one frame, each later one for 4.

    ``latents_per_call`` latent frames go through the network together. The frames are the same; more of them take
    that many times the memory and save the per-call costs (which matter where weights are dequantized at each call).
    ``strips``, which may change between two calls, cuts the frame for less memory; see ``vae_tiles``.
    """

    def __init__(self, vae: StreamingVAE, *, latents_per_call: int = 1) -> None:
        if latents_per_call < 1:
            raise ValueError(f"latents_per_call is {latents_per_call}; expected 1 or more")
        self._vae = vae
        self._latents_per_call = latents_per_call
        self.strips = 1
        self.state = DecoderState(slots=[None] * num_slots(vae.vae.decoder))

    @torch.no_grad()
    def prime(self, latent: Tensor) -> None:
        """Fill the cache from normalised latents [16, k, h, w] (``motion_latents[:, :7]``); their frames are dropped.

        Raises ValueError when the decoder has seen latents before.
        """
        if self.state.num_latents:
            raise ValueError(f"the decoder has seen {self.state.num_latents} latent frames; prime a new one instead")
        for piece in self._pieces(latent):
            self._run(piece)

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Decode normalised latents [16, k, h, w] to frames [3, 4k, H, W] in [-1, 1], float32.

        Without priming the first call gives [3, 4k - 3, H, W]. After it all 4k frames are there; that a video's
        first block loses its first ``DROPPED_FIRST_FRAMES`` is the pipeline's affair.

        Raises ValueError unless latents have 16 channels and the height and width of those seen before.
        """
        # Joined as they lie, pixel by pixel.
        pieces = [self._run(piece).permute(1, 2, 3, 0).float() for piece in self._pieces(latent)]
        return torch.cat(pieces).permute(3, 0, 1, 2)

    def _pieces(self, latent: Tensor) -> list[Tensor]:
        _check_latent(latent, self._vae.vae.config["z_dim"])
        # The library upsamples in time only from the second latent frame on, so the first has to go alone.
        head = 1 if self.state.num_latents == 0 else 0
        pieces = [latent[:, :head], *latent[:, head:].split(self._latents_per_call, dim=1)]
        return [piece for piece in pieces if piece.shape[1]]

    def _run(self, latent: Tensor) -> Tensor:
        """[16, k, h, w] to clamped frames in the compute dtype; updates the cache."""
        vae, state = self._vae.vae, self.state
        z = channels_last(self._vae.denormalise(latent)[None].to(self._vae.dtype))
        x = decoder_head(vae.decoder, vae.post_quant_conv(z), state.slots, position := [0])
        if self.strips == 1:
            frames = decoder_tail(vae.decoder, x, state.slots, position)
        else:

            def run(x: Tensor, slots: list[Slot]) -> Tensor:
                frames = decoder_tail(vae.decoder, x, slots, [0])
                _own_storage(slots)
                return frames

            done = position[0]
            frames, state.slots[done:] = decode_in_strips(run, x, state.slots[done:], self.strips)
        _own_storage(state.slots)
        state.num_latents += latent.shape[1]
        return frames[0].clamp_(-1.0, 1.0)


@dataclass(kw_only=True)
class DecoderState:
    """Causal cache of one running decode: a slot for each causal convolution, and the latent frames seen so far."""

    slots: list[Slot]
    num_latents: int = 0

    def nbytes(self) -> int:
        """Bytes that the cache keeps alive; constant from the third latent frame on."""
        return sum(slot.untyped_storage().nbytes() for slot in self.slots if isinstance(slot, Tensor))


@dataclass(kw_only=True)
class EncoderState:
    """Causal cache of one running encode: a list of slots for each stage, and how many stages will not change again."""

    slots: list[list[Slot]]
    num_settled: int = 0

    @classmethod
    def empty(cls, stages: list[EncoderStage]) -> EncoderState:
        return cls(slots=[[None] * stage.num_slots for stage in stages])


def _own_storage(slots: list[Slot]) -> None:
    """Copy cached tensors that are views of larger ones: a view would keep a whole chunk's activations alive."""
    for index, slot in enumerate(slots):
        if isinstance(slot, Tensor) and slot.untyped_storage().nbytes() > slot.numel() * slot.element_size():
            slots[index] = slot.clone(memory_format=torch.channels_last_3d)


def _same_slots(before: list[Slot], after: list[Slot]) -> bool:
    return all(
        isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
        for a, b in zip(before, after, strict=True)
    )


def _check_video(shape: tuple[int, ...]) -> None:
    if len(shape) != 4 or shape[0] != 3:
        raise ValueError(f"video has shape {list(shape)}; expected [3, T, H, W]")
    _, num_frames, height, width = shape
    if num_frames % FRAMES_PER_LATENT != 1:
        raise ValueError(f"video has {num_frames} frames; expected 4n + 1, as the first one has a latent of its own")
    if height % PIXELS_PER_LATENT or width % PIXELS_PER_LATENT or not height * width:
        raise ValueError(f"frames are {height} x {width}; expected multiples of {PIXELS_PER_LATENT}")


def _check_latent(latent: Tensor, channels: int) -> None:
    if latent.ndim != 4 or latent.shape[0] != channels or not latent.numel():
        raise ValueError(f"latent has shape {list(latent.shape)}; expected [{channels}, k, h, w] with k of 1 or more")
