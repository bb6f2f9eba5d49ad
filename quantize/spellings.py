"""The encoders' tensors under the names of the libraries' modules, from each spelling that they are published in."""

from __future__ import annotations

import re

from lowvram_models.names import umt5_name, vae_names
from lowvram_quantize.source import TensorTable

# llama.cpp's names of T5's tensors (gguf-py's tensor_mapping, architecture T5ENCODER).
_GGUF_OUTSIDE = {"token_embd.weight": "shared.weight", "enc.output_norm.weight": "encoder.final_layer_norm.weight"}
_GGUF_IN_BLOCK = {
    "attn_norm": "layer.0.layer_norm",
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "ffn_norm": "layer.1.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
}
_GGUF_BLOCK = re.compile(r"enc\.blk\.(\d+)\.(\w+)\.weight")
# What transformers' whole model and ComfyUI's files have beside the encoder: the decoder, the embedding under a second
# name, and the tokenizer's bytes.
_T5_BESIDE = re.compile(r"decoder\..*|lm_head\.weight|spiece_model|encoder\.embed_tokens\.weight")
_T5_MODULE = re.compile(r"shared\.weight|encoder\.(block\.\d+\.layer\.[01]|final_layer_norm)\..*")


def umt5_table(table: TensorTable) -> tuple[TensorTable, list[str]]:
    """The encoder under transformers' names, and the names that it does not have."""
    renamed: TensorTable = {}
    unknown = []
    modules = any(name.startswith("encoder.block.") for name in table)
    for name, ref in table.items():
        if modules and _T5_BESIDE.fullmatch(name):
            continue
        ours = _module_name(name) if modules else umt5_name(name) or _gguf_name(name)
        if ours is None:
            unknown.append(name)
        else:
            renamed[ours] = ref
    if modules and "shared.weight" not in renamed and "encoder.embed_tokens.weight" in table:
        renamed["shared.weight"] = table["encoder.embed_tokens.weight"]
    return renamed, unknown


def _module_name(name: str) -> str | None:
    return name if _T5_MODULE.fullmatch(name) else None


def _gguf_name(name: str) -> str | None:
    match = _GGUF_BLOCK.fullmatch(name)
    inside = _GGUF_IN_BLOCK.get(match[2]) if match else None
    return f"encoder.block.{match[1]}.{inside}.weight" if match and inside else _GGUF_OUTSIDE.get(name)


def vae_table(table: TensorTable) -> TensorTable:
    """The VAE under diffusers' names; unknown names come through as they are."""
    if "encoder.conv_in.weight" in table:
        return table
    names = vae_names(table)
    return {names[name]: ref for name, ref in table.items()}
