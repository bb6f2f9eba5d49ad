"""Encoders of the synthetic checkpoint: published names and shapes of VAE and UMT5, tokenizer, wav2vec2."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lowvram_models.constants import LATENT_CHANNELS, SPEECH_RATE_HZ

if TYPE_CHECKING:
    from transformers import Wav2Vec2ForCTC

_VAE_WIDTHS = (1, 2, 4, 4)
_VAE_BLOCKS = 2
# Where the encoder halves time as well as space; the decoder does it in the opposite order.
_VAE_HALVES_TIME = (False, True, True)
_T5_LAYERS = 3
_T5_HEADS = 4
_T5_BUCKETS = 32
_SPECIAL_TOKENS = ("<pad>", "</s>", "<s>", "<unk>")
_SPACE = "▁"
# Frequent pieces of English, so that a usual prompt fits in a small text_len; all else is spelled out.
_PIECES = (
    "th he in er an re on at en nd ti es or te of ed is it al ar st to nt ng se ha as ou io le ve co me de hi ri ro "
    "ing and ent ion her for tha nth int ere tio ter est ers ati all ver with ▁a ▁the ▁of ▁and ▁to ▁in ▁is ▁on ▁at "
    "▁with ▁person ▁man ▁woman ▁speak ▁speaks ▁talk ▁talks ▁smile ▁smiles ▁camera ▁warm ▁light ▁room ▁face ▁voice"
)

Shapes = dict[str, tuple[int, ...]]


def vae_shapes(base: int) -> Shapes:
    """Names and shapes of the published causal 3D VAE (``Wan2.1_VAE.pth``) with ``base`` rows in its first layer."""
    widths = [base * factor for factor in _VAE_WIDTHS]
    top = widths[-1]
    shapes = _conv("encoder.conv1", base, 3, 3, 3, 3) | _encoder_levels(widths) | _middle("encoder", top)
    shapes |= _norm("encoder.head.0", top) | _conv("encoder.head.2", 2 * LATENT_CHANNELS, top, 3, 3, 3)
    shapes |= _conv("conv1", 2 * LATENT_CHANNELS, 2 * LATENT_CHANNELS, 1, 1, 1)
    shapes |= _conv("conv2", LATENT_CHANNELS, LATENT_CHANNELS, 1, 1, 1)
    shapes |= _conv("decoder.conv1", top, LATENT_CHANNELS, 3, 3, 3) | _middle("decoder", top)
    shapes |= _decoder_levels(widths[::-1])
    return shapes | _norm("decoder.head.0", base) | _conv("decoder.head.2", 3, base, 3, 3, 3)


def _encoder_levels(widths: list[int]) -> Shapes:
    layers: list[tuple[str, int, int, bool]] = []
    seen = widths[0]
    for level, width in enumerate(widths):
        for _ in range(_VAE_BLOCKS):
            layers.append(("residual", seen, width, False))
            seen = width
        if level < len(widths) - 1:
            layers.append(("resample", width, width, _VAE_HALVES_TIME[level]))
    shapes: Shapes = {}
    for index, (kind, wide_in, wide_out, in_time) in enumerate(layers):
        name = f"encoder.downsamples.{index}"
        if kind == "residual":
            shapes |= _residual(name, wide_in, wide_out)
            continue
        shapes |= _conv(f"{name}.resample.1", wide_out, wide_in, 3, 3)
        shapes |= _conv(f"{name}.time_conv", wide_out, wide_in, 3, 1, 1) if in_time else {}
    return shapes


def _decoder_levels(widths: list[int]) -> Shapes:
    """Each upsampler halves the channels, and doubles time by a convolution to twice of them before that."""
    doubles_time = _VAE_HALVES_TIME[::-1]
    shapes: Shapes = {}
    index, seen = 0, widths[0]
    for level, width in enumerate(widths):
        for _ in range(_VAE_BLOCKS + 1):
            shapes |= _residual(f"decoder.upsamples.{index}", seen, width)
            index, seen = index + 1, width
        if level == len(widths) - 1:
            return shapes
        name, seen = f"decoder.upsamples.{index}", width // 2
        shapes |= _conv(f"{name}.resample.1", seen, width, 3, 3)
        shapes |= _conv(f"{name}.time_conv", 2 * width, width, 3, 1, 1) if doubles_time[level] else {}
        index += 1
    return shapes


def _middle(side: str, width: int) -> Shapes:
    attention = f"{side}.middle.1"
    return (
        _residual(f"{side}.middle.0", width, width)
        | {f"{attention}.norm.gamma": (width, 1, 1)}
        | _conv(f"{attention}.to_qkv", 3 * width, width, 1, 1)
        | _conv(f"{attention}.proj", width, width, 1, 1)
        | _residual(f"{side}.middle.2", width, width)
    )


def _residual(name: str, wide_in: int, wide_out: int) -> Shapes:
    shapes = _norm(f"{name}.residual.0", wide_in) | _conv(f"{name}.residual.2", wide_out, wide_in, 3, 3, 3)
    shapes |= _norm(f"{name}.residual.3", wide_out) | _conv(f"{name}.residual.6", wide_out, wide_out, 3, 3, 3)
    return shapes if wide_in == wide_out else shapes | _conv(f"{name}.shortcut", wide_out, wide_in, 1, 1, 1)


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.gamma": (width, 1, 1, 1)}


def _conv(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def t5_shapes(vocabulary: int, width: int) -> Shapes:
    """Names and shapes of the published UMT5 encoder, 3 layers of 4 heads, feed-forward twice the width."""
    shapes: Shapes = {"token_embedding.weight": (vocabulary, width)}
    for layer in range(_T5_LAYERS):
        name = f"blocks.{layer}"
        shapes[f"{name}.norm1.weight"] = (width,)
        shapes |= {f"{name}.attn.{which}.weight": (width, width) for which in "qkvo"}
        shapes[f"{name}.norm2.weight"] = (width,)
        shapes |= {f"{name}.ffn.{which}.weight": (2 * width, width) for which in ("gate.0", "fc1")}
        shapes[f"{name}.ffn.fc2.weight"] = (width, 2 * width)
        shapes[f"{name}.pos_embedding.embedding.weight"] = (_T5_BUCKETS, _T5_HEADS)
    return shapes | {"norm.weight": (width,)}


def text_tokenizer() -> tuple[Tokenizer, dict[str, Any]]:
    """A Unigram tokenizer as UMT5's, with ASCII and some English pieces, and its ``tokenizer_config.json``."""
    characters = [_SPACE, *string.ascii_letters, *string.digits, *string.punctuation]
    # A piece is worth more than its characters apart, so the longest ones win.
    scores = [(token, 0.0) for token in _SPECIAL_TOKENS]
    scores += [(character, -6.0) for character in characters] + [(piece, -7.0) for piece in _PIECES.split()]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=_SPECIAL_TOKENS.index("<unk>"), byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme="always")
    end = "</s>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, _SPECIAL_TOKENS.index(end))]
    )
    tokenizer.add_special_tokens(list(_SPECIAL_TOKENS))
    names = {"pad_token": "<pad>", "eos_token": end, "bos_token": "<s>", "unk_token": "<unk>"}
    return tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **names}


def wav2vec2_model(width: int, **changes: Any) -> Wav2Vec2ForCTC:
    """The published audio encoder's architecture (24 layers, layer norm before) at ``width``; for a meta device.

    All else is small; ``changes`` are fields of transformers' configuration to set otherwise.
    """
    # Four seconds to import, and a conversion needs no more than this module's constants.
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    small: dict[str, Any] = {
        "intermediate_size": 2 * width,
        "num_attention_heads": 4,
        "conv_dim": (16,) * 7,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
    }
    config = Wav2Vec2Config(
        hidden_size=width,
        num_hidden_layers=24,
        conv_bias=True,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        vocab_size=33,
        **small | changes,
    )
    return Wav2Vec2ForCTC(config)


def wav2vec2_preprocessor() -> dict[str, Any]:
    """``preprocessor_config.json``: 16 kHz, zero mean and unit variance."""
    return {
        "do_normalize": True,
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": True,
        "sampling_rate": SPEECH_RATE_HZ,
    }
