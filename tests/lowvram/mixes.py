"""Mixed DiTs: which Linears of them are stored otherwise than in int8."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lowvram_models.config import DiTConfig
from lowvram_quantize.components import dit_shapes
from lowvram_quantize.schemes import dit_scheme

# Name -> pattern of tensors -> how they are stored. What shares its input is stored alike.
MIXES: dict[str, dict[str, str]] = {
    "the first layer in bf16": {r"blocks\.0\..*": "bf16"},
    "FFN-down in bf16": {r"blocks\.\d+\.ffn\.2\.weight": "bf16"},
    "all of the FFN in bf16": {r"blocks\.\d+\.ffn\..*": "bf16"},
    "attention in bf16": {r"blocks\.\d+\.(self|cross)_attn\..*": "bf16"},
    "text in fp8, its queries in bf16": {
        r"blocks\.\d+\.cross_attn\.[kvo]\.weight": "fp8",
        r"blocks\.\d+\.cross_attn\.q\.weight": "bf16",
    },
    "text in bf16, its queries in fp8": {
        r"blocks\.\d+\.cross_attn\.[kvo]\.weight": "bf16",
        r"blocks\.\d+\.cross_attn\.q\.weight": "fp8",
    },
    "the voice in bf16, its keys in fp8": {
        r"audio_injector\.injector\.\d+\.[qo]\.weight": "bf16",
        r"audio_injector\.injector\.\d+\.[kv]\.weight": "fp8",
        r"audio_injector\.injector_adain_layers\..*linear\.weight": "bf16",
    },
    "every layer otherwise": {
        r"blocks\.0\.self_attn\.[qkv]\.weight": "bf16",
        r"blocks\.0\.ffn\.2\.weight": "fp8",
        r"blocks\.1\.(cross_attn\.o|ffn\.0)\.weight": "bf16",
        r"blocks\.2\..*": "fp8",
        r"frame_packer\.proj_2x\.weight": "bf16",
    },
}


def apart(config: Mapping[str, object], mix: str) -> dict[str, str]:
    """Weights of a DiT of that configuration -> how they are stored."""
    every = dit_shapes(DiTConfig.from_dict(dict(config)))
    names = [name for name in every if dit_scheme(name, "int8").kind == "rows"]
    found = {}
    for pattern, precision in MIXES[mix].items():
        found |= dict.fromkeys((name for name in names if re.fullmatch(pattern, name)), precision)
    return found
