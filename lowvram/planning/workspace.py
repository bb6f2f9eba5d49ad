"""Workspace: bytes that a stage takes on the device only while it works: what a call allocates beside its inputs.

And those of CUDA graphs of resident layers (``lowvram.denoise.cuda_graphs``).
Each term names the tensors that are alive together at the worst moment of the code it stands for, so that it can be
corrected when that code changes; the tests count live bytes of that code and compare.
"""

from __future__ import annotations

import dataclasses

from lowvram.offload.placement import Placement
from lowvram.planning.memory_costs import BFLOAT16_BYTES, FLOAT32_BYTES, KIB, MIB, key_bytes
from lowvram.planning.model_sizes import AudioSizes, ModelSizes
from lowvram.planning.rank_layout import Share
from lowvram.planning.workload import Workload
from lowvram_models import constants
from lowvram_models.config import DiTConfig
from lowvram_models.constants import CONTEXT_S, FRAMES_PER_LATENT, SPEECH_RATE_HZ, WHOLE_FILE_S

GRAPH_BYTES = 128 * KIB
"""One graph as the driver keeps it, about 30 launches. Not measured: a judgement."""
STREAM_BYTES = 32 * MIB
"""cuBLAS's workspace for the stream that captures, on Hopper; less before."""


def graph_bytes(sizes: ModelSizes, work: Workload, placement: Placement, share: Share) -> int:
    """The graphs themselves, one for each ring that stays on the device with its layer and each of its slots; the pool
    in which a layer works, beside that of layers without a graph; and what a call reads, once for each step.

    0 where nothing is captured.
    """
    config, streamed = sizes.config, set(placement.streamed_layers)
    hosted = sum(layer not in streamed for _, layer in placement.host_rings)
    cells = len(share.steps) * (config.num_layers - len(streamed)) - hosted
    if not cells or share.exchanges:
        return 0
    seen = work.ring_tokens + work.sink_tokens
    pool = layer_workspace(
        config, share.block_tokens, quantized=sizes.quantized, seen_tokens=seen, value_bytes=work.value_bytes
    ).peak
    inputs = [rollout_inputs(config, work, blocks, share) for blocks in (len(share.steps), 0)]
    # A clip that is no multiple of a block has shorter blocks, with inputs of their own.
    lanes = (inputs[0] - inputs[1]) * (2 if work.frames_per_clip % work.frames_per_block else 1)
    return cells * work.blocks_per_clip * GRAPH_BYTES + STREAM_BYTES + pool + lanes


# Full-resolution planes of the VAE: multiples of base width x height x width of a frame in the dtype of the VAE, alive
# at once. Counted over diffusers' AutoencoderKLWan as ``lowvram_models.vae`` runs it, at 256 x 384 to 720 x 1280.
DECODER_CACHE_PLANES = 24.63
DECODER_PLANES = 24.01
ENCODER_PLANES = 36.77

# The longest stretches of a voice that go through wav2vec2 at once, of a short and of a long one, and its
# features a second.
AUDIO_S, WINDOW_S, FEATURES_PER_S = WHOLE_FILE_S, constants.WINDOW_S + 2 * CONTEXT_S, 50
_RGB = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerWorkspace:
    """Bytes beside weights, memory and residual, at the worst moment of each part of one layer over L tokens, and of
    the embedding before the first."""

    embed: int
    norms: int
    attend: int
    feed_forward: int
    audio: int

    @property
    def layer(self) -> int:
        return max(self.norms, self.attend, self.feed_forward, self.audio)

    @property
    def peak(self) -> int:
        return max(self.embed, self.layer)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attended:
    """What a rank attends with where tokens are shared out: all ``tokens``, its own ``heads``."""

    tokens: int
    heads: int


def layer_workspace(
    config: DiTConfig,
    tokens: int,
    *,
    quantized: bool,
    seen_tokens: int = 0,
    audio: bool = True,
    attended: Attended | None = None,
    value_bytes: int = BFLOAT16_BYTES,
) -> LayerWorkspace:
    """What ``CausalDiT.layer`` and its attention memory allocate over ``tokens`` tokens, activations of
    ``value_bytes`` each.

    ``quantized``: Linears take 8-bit activations. ``seen_tokens``: keys of ring and sink that are laid out for
    attention (none in the sink pass). ``audio``: with injection (a block, not the sink pass). ``attended``: where the
    tokens are one rank's share of more; None: they are all.
    """
    everything = attended or Attended(tokens=tokens, heads=config.num_heads)
    width = everything.heads * config.head_dim
    values = everything.tokens * width  # of all tokens, this rank's heads
    half = tokens * config.dim * value_bytes  # [L, D] as activations
    full = tokens * config.dim * FLOAT32_BYTES  # [L, D] in float32
    wide_half, wide_full = (tokens * config.ffn_dim * size for size in (value_bytes, FLOAT32_BYTES))
    wide_byte = tokens * config.ffn_dim
    copies = int(value_bytes != FLOAT32_BYTES)  # what is in float32 already is not copied to it
    # RMSNorm of a projection in float32: its copy, scaled, weighted; the projection and the layer's input beside it.
    rms_norm = 2 * half + (copies + 2) * full
    # RoPE in float32: the copy, two rotated halves (as much again), the stacked result; or the codec's float32 copies.
    rotation = (copies + 2) * max(full, values * FLOAT32_BYTES)
    # Keys and values laid out, and of the block that is decoded the values in float32 beside the keys.
    laid_out = 2 * seen_tokens * width * value_bytes + values * (FLOAT32_BYTES + value_bytes)
    # Queries, keys and values in the order in which they are sent, and those that came.
    exchange = 3 * (half + values * value_bytes) if attended else 0
    # Plain: both sides of the GELU. 8-bit: the second Linear's input, its float32 copy, that scaled, its 8-bit values.
    feed_forward = wide_half + (copies + 1) * wide_full + wide_byte if quantized else half + 2 * wide_half
    return LayerWorkspace(
        # All ranks embed all tokens: what the latent gives, the pose, their sum, and that in float32.
        embed=everything.tokens * config.dim * (3 * value_bytes + copies * FLOAT32_BYTES),
        norms=full + rms_norm,  # cross-attention's, with the new residual beside it
        attend=4 * half + exchange + max(rotation, laid_out),  # the layer's input, q, k, v
        feed_forward=full + feed_forward,
        # The new residual, and what the feed-forward gave: PyTorch holds it while it norms their sum.
        audio=full + half + rms_norm if audio else 0,
    )


def rollout_inputs(config: DiTConfig, work: Workload, wave: int, share: Share) -> int:
    """Residuals, rotations, text and audio of ``wave`` blocks that are under way, and what layers keep of timesteps
    (modulations), text (8-bit rows) and audio (modulations, keys and values)."""
    own = share.block_tokens if share.exchanges else 0  # rotations of own tokens stand beside those of all
    rope = 2 * FLOAT32_BYTES * (config.head_dim // 2) * (work.block_tokens + own + work.sink_tokens)
    residual = share.block_tokens * config.dim * FLOAT32_BYTES
    heard = work.frames_per_block * config.dim * (10 * work.value_bytes + 2 * FLOAT32_BYTES)
    audio = 6 * work.frames_per_block * config.dim * work.value_bytes + len(config.audio_inject_layers) * heard
    text = config.text_len * (config.dim * (work.value_bytes + 1) + FLOAT32_BYTES)
    times = (work.sample_steps + 1) * 7 * config.dim * FLOAT32_BYTES
    # Six modulations, four of them smoothed or with 1 added, and the middle norm's gain and offset in 2 bytes.
    times += len(share.steps) * config.num_layers * 11 * config.dim * FLOAT32_BYTES
    # Of blocks that wait for the layer, what it gave and the next pass adds stands beside their residual.
    waiting = max(0, wave - 1) * share.block_tokens * config.dim * work.value_bytes
    return wave * (rope + residual + audio) + waiting + text + times


def rotated_keys(config: DiTConfig, work: Workload, kv: str, share: Share) -> int:
    """Room for the sink's rotated keys of one layer; plain rings have none."""
    return key_bytes(config, work.sink_tokens, share.heads) if kv == "int8" else 0


def decoder_cache(base_dim: int, work: Workload) -> int:
    """The last two inputs of every causal convolution; kept from block to block."""
    return int(DECODER_CACHE_PLANES * base_dim * work.pixels * work.value_bytes)


def decode_workspace(base_dim: int, work: Workload) -> int:
    """One latent frame through the decoder, with the block's frames decoded before it."""
    return int(DECODER_PLANES * base_dim * work.pixels * work.value_bytes) + _frames(work)


def encode_workspace(base_dim: int, work: Workload) -> int:
    """Four video frames through the encoder, its cache of before and after included."""
    return int(ENCODER_PLANES * base_dim * work.pixels * work.value_bytes)


def _frames(work: Workload) -> int:
    """Pixels in float32 of a block's latent frames before its last."""
    return (work.frames_per_block - 1) * FRAMES_PER_LATENT * _RGB * work.pixels * FLOAT32_BYTES


def text_workspace(sizes: ModelSizes, value_bytes: int) -> int:
    """UMT5 over ``text_len`` tokens: scores and biases of all heads in float32, and one Linear's weight dequantized."""
    tokens = sizes.config.text_len
    copy = FLOAT32_BYTES if value_bytes != FLOAT32_BYTES else 0  # scores go through the softmax in float32
    scores = tokens**2 * sizes.text_heads * (4 * value_bytes + copy)
    hidden = tokens * (6 * sizes.text_width + 2 * sizes.text_ffn) * value_bytes
    return scores + hidden + 2 * sizes.text_width * sizes.text_ffn * value_bytes


def audio_workspace(audio: AudioSizes, seconds: int = AUDIO_S) -> int:
    """wav2vec2 in float32 over a stretch, the longest by default: its first convolution, or all hidden states with one
    layer's scores before and after the softmax."""
    features = seconds * FEATURES_PER_S
    first = 2 * audio.conv_channels * seconds * SPEECH_RATE_HZ // audio.conv_stride
    states = (audio.layers + 7) * features * audio.width + 2 * audio.heads * features**2
    return max(first, states) * FLOAT32_BYTES
