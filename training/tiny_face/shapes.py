"""Sizes of the tiny model, how its DiT begins, and the text encoder that it keeps as it was drawn."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from lowvram_models.config import DiTConfig
from lowvram_models.dit import CausalDiT
from lowvram_models.names import umt5_name
from lowvram_models.text_encoder import build_umt5
from lowvram_quantize.presets import dit_config
from lowvram_quantize.synthetic import Draw
from lowvram_quantize.synthetic_encoders import t5_shapes, text_tokenizer
from training.tiny_face.train_ears import WIDTH as AUDIO_DIM

SETTINGS: dict[str, Any] = {
    "dim": 128, "ffn_dim": 320, "num_heads": 4, "num_layers": 5, "freq_dim": 32, "text_len": 32, "text_dim": 32,
    "audio_dim": AUDIO_DIM, "audio_inject_layers": [0, 1, 3],
}  # fmt: skip
TEXT_SEED = 0
PROMPTS = (
    "A person speaks",
    "A cheerful person with round glasses speaks to the camera",
    "A woman talks in a warm room",
    "",
    "A man speaks on a stage, in cold light",
    "Somebody reads the news",
    "portrait, studio, talking",
    "A face, a voice",
)


def new_dit(settings: dict[str, Any] | None = None) -> CausalDiT:
    """A DiT that begins where little is to be learned: noise passes through it to the head, half of its heads look at
    their own place in every frame, and gates are open."""
    dit = CausalDiT(DiTConfig.from_dict(dit_config(settings or SETTINGS)))
    with torch.no_grad():
        _pass_through(dit)
        for block in dit.blocks:
            block.modulation.normal_(0, 0.02)
            block.modulation[0, 2] = block.modulation[0, 5] = 1.0
            block.ffn[2].weight.mul_(0.3)
            block.self_attn.o.weight.mul_(0.5)
            nn.init.zeros_(block.cross_attn.o.weight)
            nn.init.zeros_(block.cross_attn.o.bias)
            _look_around(block.self_attn, dit.config.num_heads)
        dit.head.modulation.zero_()
        nn.init.normal_(dit.casual_audio_encoder.encoder.padding_tokens, 0, 0.1)
        dit.trainable_cond_mask.weight.mul_(0.3)
    return dit


def _pass_through(dit: CausalDiT) -> None:
    patch, head = dit.patch_embedding, dit.head.head
    inputs = patch.weight[0].numel()
    scale = math.sqrt(patch.weight.shape[0] / inputs)
    if scale < 1:  # too narrow for all of a patch
        return
    nn.init.orthogonal_(patch.weight.view(patch.weight.shape[0], -1), gain=scale)
    nn.init.zeros_(patch.bias)
    nn.init.zeros_(head.bias)
    dit.frame_packer.proj.weight.copy_(patch.weight)
    # The head writes a patch as (rows, columns, channels), the embedding reads (channels, rows, columns).
    back = patch.weight[:, :, 0].permute(2, 3, 1, 0).reshape(inputs, -1)
    head.weight.copy_(back / scale**2)


def _look_around(attention: nn.Module, heads: int) -> None:
    """Biases of queries and keys that RoPE turns into a kernel over rows and columns, for half of the heads."""
    width = attention.q.weight.shape[0] // heads
    pairs = width // 2
    space = pairs // 3
    time = pairs - 2 * space
    for head in range(heads // 2):
        rows = slice(head * width, (head + 1) * width)
        for projection in (attention.q, attention.k):
            projection.weight[rows] *= 0.3
            projection.bias[rows] = 0
            for pair in (time, time + 1, time + space, time + space + 1):
                projection.bias[head * width + 2 * pair] = 4.0


def text_tensors() -> dict[str, Tensor]:
    """The text encoder under its published names, random; bfloat16 values."""
    tokenizer, _ = text_tokenizer()
    return Draw(TEXT_SEED).all(t5_shapes(tokenizer.get_vocab_size(), int(SETTINGS["text_dim"])), torch.bfloat16)


@functools.cache
def contexts() -> list[Tensor]:
    """What the text encoder makes of ``PROMPTS``, each [tokens, text_dim]."""
    tokenizer, _ = text_tokenizer()
    width = int(SETTINGS["text_dim"])
    model = build_umt5(vocab_size=tokenizer.get_vocab_size(), d_model=width, d_ff=2 * width, num_heads=4, num_layers=3)
    state = {str(umt5_name(name)): tensor.float() for name, tensor in text_tensors().items()}
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    model.load_state_dict(state, strict=True)
    ids = [tokenizer.encode(prompt).ids[: SETTINGS["text_len"]] for prompt in PROMPTS]
    with torch.no_grad():
        return [model(input_ids=torch.tensor([row])).last_hidden_state[0].clone() for row in ids]
