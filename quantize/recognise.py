"""Recognition of what a table of tensors holds, by its names and shapes: a file may be called anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from lowvram_models.constants import LATENT_CHANNELS
from lowvram_quantize.slabs import PAD
from lowvram_quantize.source import AUDIO_ENCODER_FOLDER, BASE_FOLDER, TEXT_ENCODER_FILE, VAE_FILE, TensorTable

WANTED = {
    "dit": f"the DiT of {BASE_FOLDER}",
    "vae": "the VAE of Wan 2.1",
    "text_encoder": "the UMT5-XXL encoder",
    "audio_encoder": "a wav2vec2 encoder",
}
FETCH = {
    "dit": f"fetch {BASE_FOLDER}'s diffusion_pytorch_model shards with config.json, or an edition of that model",
    "vae": f"fetch {VAE_FILE} of {BASE_FOLDER}",
    "text_encoder": f"fetch {TEXT_ENCODER_FILE} of {BASE_FOLDER}",
    "audio_encoder": f"fetch the folder {AUDIO_ENCODER_FOLDER} of {BASE_FOLDER}",
}

_DIT = "blocks.0.self_attn.q.weight"
_WAV2VEC2 = "feature_extractor.conv_layers.0.conv.weight"
_LORA_MARKS = frozenset(
    ("lora_A", "lora_B", "lora_down", "lora_up", "hada_w1_a", "lokr_w1", "lokr_w1_a", "diff", "diff_b", "oft_blocks",
     "oft_R", "boft_R", "dora_scale")
)  # fmt: skip
# How the three spellings of T5 call the embedding of relative positions of the second block, which UMT5 alone has,
# and what is in every T5: the published file's, transformers' (also ComfyUI's), and llama.cpp's in GGUF files.
_T5 = {
    "blocks.0.attn.q.weight": "blocks.1.pos_embedding.embedding.weight",
    "encoder.block.0.layer.0.SelfAttention.q.weight": (
        "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
    ),
    "enc.blk.0.attn_q.weight": "enc.blk.1.attn_rel_b.weight",
}
# The VAE's first convolutions under the published names and under diffusers', with the decoder's, which tells 16
# latent channels (Wan 2.1) from 48 (TI2V-5B).
_VAE = {"encoder.conv1.weight": "decoder.conv1.weight", "encoder.conv_in.weight": "decoder.conv_in.weight"}
# Wan's siblings that the same layers are in, by a name that is theirs alone.
_SIBLINGS = {
    "vace_blocks.": "VACE",
    "face_adapter.": "Animate",
    "motion_encoder.": "Animate",
    "audio_proj.": "MultiTalk or InfiniteTalk",
    "control_adapter.": "Fun-Camera",
    "ref_conv.": "Fun-Control",
}
# Other things that lie in the same folders, by a part of a name.
_OTHERS = {
    ".attn1.to_q.weight": "a Wan transformer in diffusers' layout, which has names of its own",
    "double_blocks.0.": "a transformer of FLUX or HunyuanVideo",
    "transformer_blocks.0.": "a transformer of another model",
    "joint_blocks.0.": "a transformer of Stable Diffusion 3",
    "input_blocks.0.": "a UNet of Stable Diffusion",
    "visual.transformer.": "a CLIP model",
    "vision_model.encoder.": "a CLIP vision encoder",
    "text_model.encoder.": "a CLIP text encoder",
    "model.layers.0.self_attn.": "a language model",
    "blk.0.attn_q.": "a language model",
    "model.encoder.conv1.weight": "a Whisper encoder",
}


@dataclasses.dataclass(frozen=True)
class Part:
    """``kind`` is a component, "lora" or "other"; ``what`` says it to a person; its names begin with ``prefix``."""

    kind: str
    what: str
    prefix: str = ""


def parts_of(table: TensorTable) -> list[Part]:
    """What a table holds; a file may hold several things, each behind a prefix of its own."""
    if any(_LORA_MARKS.intersection(name.split(".")) for name in table):
        return [Part("lora", "a LoRA")]
    parts = [_dit(table, prefix) for prefix in _before(table, _DIT)]
    for first, later in _T5.items():
        parts += [_text_encoder(table, prefix, prefix + later) for prefix in _before(table, first)]
    for first, decoder in _VAE.items():
        parts += [_vae(table, prefix, prefix + first, prefix + decoder) for prefix in _before(table, first)]
    for prefix in _before(table, _WAV2VEC2):
        parts.append(Part("audio_encoder", "a wav2vec2 encoder", prefix.removesuffix("wav2vec2.")))
    if parts:
        return parts
    for mark, what in _OTHERS.items():
        if any(mark in name for name in table):
            return [Part("other", what)]
    return [Part("other", f"{len(table)} tensors as {next(iter(table))!r}" if table else "no tensors")]


def said(parts: Iterable[Part]) -> str:
    return " and ".join(dict.fromkeys(part.what for part in parts))


def _before(table: TensorTable, name: str) -> list[str]:
    """What stands before that name: "" or something that ends in a dot."""
    return sorted(n.removesuffix(name) for n in table if n == name or n.endswith(f".{name}"))


def _dit(table: TensorTable, prefix: str) -> Part:
    heads = {name.removeprefix(prefix).partition(".")[0] + "." for name in table if name.startswith(prefix)}
    if "casual_audio_encoder." in heads or "audio_injector." in heads:
        return Part("dit", WANTED["dit"], prefix)
    for mark, sibling in _SIBLINGS.items():
        if mark in heads:
            return Part("other", f"a Wan {sibling} model (no S2V)", prefix)
    shape: tuple[int, ...] = ()
    if f"{prefix}patch_embedding.weight" in table:
        shape = table[f"{prefix}patch_embedding.weight"].shape
    channels = shape[1] if len(shape) > 1 else 0
    if channels == 48:
        return Part("other", "a Wan TI2V model (no S2V)", prefix)
    if "img_emb." in heads or channels == 36:
        return Part("other", "a Wan I2V model (no S2V)", prefix)
    return Part("other", "a Wan T2V model (no S2V)" if channels == 16 else "a Wan model (no S2V)", prefix)


def _text_encoder(table: TensorTable, prefix: str, umt5: str) -> Part:
    if umt5 in table:
        return Part("text_encoder", WANTED["text_encoder"], prefix)
    return Part("other", "a T5 encoder (no UMT5: its blocks share one table of positions)", prefix)


def _vae(table: TensorTable, prefix: str, encoder: str, decoder: str) -> Part:
    if any(name.startswith(PAD) for name in table):  # shapes of weights are those of their bytes there
        return Part("other", "the VAE of a lowvram artifact (give the checkpoint that it was made from)", prefix)
    shape = table[encoder].shape
    if len(shape) != 5:
        what = "the VAE of an image model" if len(shape) == 4 else f"an encoder whose first layer is {list(shape)}"
        return Part("other", what, prefix)
    latent = table[decoder].shape[1] if decoder in table and len(table[decoder].shape) > 1 else LATENT_CHANNELS
    if latent != LATENT_CHANNELS:
        return Part("other", f"a video VAE of {latent} channels (of Wan 2.2 TI2V-5B where they are 48)", prefix)
    return Part("vae", WANTED["vae"], prefix)
