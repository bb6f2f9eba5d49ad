"""Each formula against the live bytes of the code that it stands for."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from lowvram.loading import fused_vae
from lowvram.loading.fused_block import fuse
from lowvram.loading.fused_vae import fuse_vae
from lowvram.parallel.ulysses import Ulysses
from lowvram.planning import Workload, workspace
from lowvram.planning.activation_passes import decode_pass_bytes
from lowvram.planning.memory_costs import decode_operations
from lowvram.planning.model_sizes import AudioSizes
from lowvram.planning.rank_layout import ParallelLayout, share_of, shares
from lowvram_kernels.modules import swap_linear
from lowvram_models.attention import CrossAttention, Heads
from lowvram_models.audio_adapter import AudioTokens
from lowvram_models.audio_encoder import build_wav2vec2
from lowvram_models.constants import SPEECH_RATE_HZ
from lowvram_models.dit import CausalDiT, LayerInputs, TimeEmbedding
from lowvram_models.rope import Rope
from lowvram_models.text_encoder import build_umt5
from lowvram_models.vae import StreamingVAE, build_vae
from tests.lowvram.planning.live_bytes import LiveBytes, meta

Tensor = torch.Tensor
BF16, FP32 = torch.bfloat16, torch.float32


class Fused(nn.Module):
    """Attention as a fused kernel does it: nothing alive but its output."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.empty_like(q)


class Memory:
    """Rotates, and lays keys out in room that is there already."""

    def __init__(self, tokens: int, heads: int, width: int, dtype: torch.dtype):
        self.keys, self.values = (meta(tokens, heads, width, dtype=dtype) for _ in range(2))

    def attend(self, queries: Heads, keys: Heads, v: Tensor, rope: Rope) -> Tensor:
        q = queries(rope)
        self.keys.copy_(keys(rope))
        self.values.copy_(v)
        return torch.empty_like(q)


class Elsewhere:
    """An exchange that receives as much as it should, from nobody."""

    @dataclasses.dataclass
    class Pending:
        flat: Tensor
        received: int

        def wait(self) -> Tensor:
            return self.flat.new_empty(self.received)

    def begin(self, flat: Tensor, sent: list[int], received: list[int]) -> Pending:
        return self.Pending(flat, sum(received))


def layer_peak(config, work: Workload, *, quantized: bool, audio: bool, ranks: int = 1, group: int = 1) -> int:
    """Of one rank of so many, the first; with rows that PyTorch quantizes, in rotated groups of ``group``."""
    dtype = work.dtype
    tokens, dim = shares(work.tokens_per_frame, ranks)[0] * work.frames_per_block, config.dim
    config = dataclasses.replace(config, num_layers=1, audio_inject_layers=(0,))
    with torch.device("meta"):
        dit = CausalDiT(config).to(dtype)
    for name, module in list(dit.named_modules()):
        if isinstance(module, CrossAttention):
            module.attention = Fused()
        if quantized and isinstance(module, nn.Linear) and name.startswith(("blocks.", "audio_injector.")):
            swap_linear(dit, name, torch.int8, group=group)
    fuse(dit)
    x = meta(tokens, dim, dtype=torch.float32)
    rope = Rope(*(meta(tokens, config.head_dim // 2, dtype=torch.float32) for _ in range(2)))
    all_of_it = Rope(*(meta(work.block_tokens, config.head_dim // 2, dtype=torch.float32) for _ in range(2)))
    inner = Memory(work.block_tokens, shares(config.num_heads, ranks)[0], config.head_dim, dtype)
    ulysses = Ulysses(0, ranks, Elsewhere())
    memory = inner if ranks == 1 else ulysses.around(inner, all_of_it, work.frames_per_block)
    heard = AudioTokens(*(meta(1, work.frames_per_block, *more, dim, dtype=dtype) for more in ((5,), ())))
    time = TimeEmbedding(meta(dim, dtype=torch.float32), meta(6, dim, dtype=torch.float32))
    text = meta(config.text_len, dim, dtype=dtype)
    inputs = LayerInputs(time=time, text=text, rope=rope, frames=work.frames_per_block, audio=heard if audio else None)
    known = [x, rope.cos, rope.sin, all_of_it.cos, all_of_it.sin, inner.keys, inner.values]
    known += [heard.frame, heard.clip, time.head, time.blocks, text]
    with torch.inference_mode():
        dit.layer(0, x, inputs, memory)  # what layers keep from call to call is none of a call's
    known += [t for kept in (*inputs.of_text.values(), *time.derived.values()) for t in kept]
    with torch.inference_mode(), LiveBytes([*known, *dit.parameters()]) as live:
        dit.layer(0, x, inputs, memory)
    return live.peak


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("size", ["384*256", "704*384"])
@pytest.mark.parametrize(("quantized", "audio"), [(True, True), (True, False), (False, True), (False, False)])
def test_a_layer_takes_what_is_predicted(sizes, size, quantized, audio, dtype):
    config, work = sizes("int8").config, Workload.of_size(size, dtype=dtype)
    predicted = workspace.layer_workspace(
        config, work.block_tokens, quantized=quantized, audio=audio, value_bytes=work.value_bytes
    )
    assert predicted.peak == pytest.approx(layer_peak(config, work, quantized=quantized, audio=audio), rel=0.02)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("group", [16, 256])
def test_rotated_groups_take_no_more_than_is_predicted(sizes, group, dtype):
    config, work = sizes("int8").config, Workload.of_size("704*384", dtype=dtype)
    predicted = workspace.layer_workspace(config, work.block_tokens, quantized=True, value_bytes=work.value_bytes)
    found = layer_peak(config, work, quantized=True, audio=True, group=group)
    assert 0.85 * predicted.peak < found < 1.02 * predicted.peak


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_a_layer_of_one_rank_of_several_takes_no_more_than_predicted(sizes, ranks, quantized, dtype):
    config, work = sizes("int8").config, Workload.of_size("720*400", dtype=dtype)
    share = share_of(config, work, ParallelLayout(num_gpus_dit=ranks, ulysses_size=ranks), 0)
    attended = workspace.Attended(tokens=work.block_tokens, heads=share.heads)
    predicted = workspace.layer_workspace(
        config, share.block_tokens, quantized=quantized, attended=attended, value_bytes=work.value_bytes
    )
    found = layer_peak(config, work, quantized=quantized, audio=True, ranks=ranks)
    assert 0.6 * predicted.layer < found <= 1.02 * predicted.layer


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_an_embedding_of_all_tokens_takes_no_more_than_predicted(sizes, dtype):
    config, work = (
        dataclasses.replace(sizes("int8").config, num_layers=1, audio_inject_layers=()),
        Workload.of_size("704*384"),
    )
    with torch.device("meta"):
        dit = CausalDiT(config).to(dtype)
    with torch.inference_mode(), LiveBytes(dit.parameters()) as live:
        dit.embed_latent(meta(16, 3, *work.latent_size, dtype=dtype))
    attended = workspace.Attended(tokens=work.block_tokens, heads=1)
    predicted = workspace.layer_workspace(
        config, 1, quantized=True, attended=attended, value_bytes=dtype.itemsize
    ).embed
    assert 0.6 * predicted < live.peak <= 1.02 * predicted


@pytest.fixture(scope="module", params=[BF16, FP32], ids=str)
def vae(request) -> StreamingVAE:
    with torch.device("meta"):
        model = build_vae(96)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(request.param)
    fuse_vae(model)
    streaming = StreamingVAE(model, dtype=request.param)
    streaming._mean, streaming._std = streaming._mean.to("meta"), streaming._std.to("meta")
    return streaming


@pytest.mark.parametrize("latents", [(48, 88), (50, 90)])
def test_the_decoder_takes_what_is_predicted(vae, latents, monkeypatch):
    work, decoder = Workload(latent_size=latents, dtype=vae.dtype), vae.start_decoder()
    block = meta(16, 3, *latents, dtype=torch.float32)

    def in_one_pass(x: Tensor, gamma: Tensor, out: Tensor) -> Tensor:
        live.moved += x.nbytes + gamma.nbytes + out.nbytes
        return out

    monkeypatch.setattr(fused_vae, "channel_norm_silu", in_one_pass)
    with LiveBytes([block, *vae.vae.parameters()]) as live:
        decoder.prime(block)
        cache = live.now()
        live.restart()
        decoder.decode(block)
    assert workspace.decoder_cache(96, work) == pytest.approx(cache, rel=0.01)
    assert workspace.decode_workspace(96, work) == pytest.approx(live.peak - cache, rel=0.03)
    assert decode_operations(96, work) == pytest.approx(live.operations, rel=0.01)
    # Attention over the pixels of a frame grows faster than they do, a little.
    assert decode_pass_bytes(96, work) == pytest.approx(live.moved, rel=0.03)


def test_the_encoder_takes_what_is_predicted(vae, monkeypatch):
    # Nothing settles, so that every stage runs: values cannot be compared where there are none.
    monkeypatch.setattr("lowvram_models.vae._same_slots", lambda before, after: False)
    portrait = meta(3, 384, 704, dtype=torch.float32)
    with LiveBytes([portrait, *vae.vae.parameters()]) as live:
        vae.encode_repeated(portrait, 13)
    work = Workload(latent_size=(48, 88), dtype=vae.dtype)
    assert workspace.encode_workspace(96, work) == pytest.approx(live.peak, rel=0.03)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_the_text_encoder_takes_less_than_predicted(sizes, dtype):
    umt5 = {"vocab_size": 256384, "d_model": 4096, "d_ff": 10240, "num_heads": 64, "num_layers": 2}
    with torch.device("meta"):
        model = build_umt5(**umt5).to(dtype)
    with torch.no_grad(), LiveBytes(model.parameters()) as live:
        model(input_ids=torch.empty(1, 512, dtype=torch.long, device="meta"))
    # The dequantized weight comes on top, and no Linear is quantized here.
    predicted = workspace.text_workspace(sizes("int8"), dtype.itemsize)
    assert 0.45 * predicted < live.peak <= predicted


def test_the_audio_encoder_takes_what_is_predicted():
    config = {
        "model_type": "wav2vec2", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
        "intermediate_size": 4096, "feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True,
    }  # fmt: skip
    with torch.device("meta"):
        model = build_wav2vec2(config)
    samples = torch.empty(1, workspace.AUDIO_S * SPEECH_RATE_HZ, device="meta")
    with torch.no_grad(), LiveBytes([samples, *model.parameters(), *model.buffers()]) as live:
        model(samples, output_hidden_states=True)
    audio = AudioSizes(parameters=0, width=1024, layers=24, heads=16, conv_channels=512, conv_stride=5)
    assert workspace.audio_workspace(audio) == pytest.approx(live.peak, rel=0.03)
