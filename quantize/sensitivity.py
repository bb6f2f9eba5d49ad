"""Sensitivity: what an error in a Linear's weight does to the DiT's output, by the Linear's place in the model.

A table of priors: measured on the tiny trained face by ``python benchmarks/sensitivity.py``, one unit of Linears at a
time in int8, all else in bf16, against bf16: the square of the output's relative error over the mean square of the
weights' relative errors, the mean of all layers. Its attention to text hardly moves the face's output, which says
nothing of a model that heeds its prompt; that has the values of the attention to the voice here. Whether the 14B is
like it is not measured.
"""

from __future__ import annotations

import re

_ROLES = (
    (re.compile(r"blocks\.\d+\.(self_attn|cross_attn|ffn)\.(\w+)"), r"\1.\2"),
    (re.compile(r"audio_injector\.injector\.\d+\.(\w+)"), r"audio.\1"),
    (re.compile(r"audio_injector\.injector_adain_layers\.\d+\.linear"), "audio.adain"),
    (re.compile(r"frame_packer\.proj_[24]x"), "frame_packer"),
)

SENSITIVITY = {
    "self_attn.qkv": 0.14,
    "self_attn.o": 0.23,
    "cross_attn.q": 0.0028,
    "cross_attn.kv": 0.017,
    "cross_attn.o": 0.035,
    "ffn.0": 0.045,
    "ffn.2": 0.024,
    "audio.q": 0.0028,
    "audio.kv": 0.017,
    "audio.o": 0.035,
    "audio.adain": 0.0001,
    "frame_packer": 0.00022,
}


def role_of(unit: str) -> str:
    """A unit's place in the model, as ``SENSITIVITY`` has it: "self_attn.qkv", "ffn.2", "audio.kv", ..."""
    for pattern, role in _ROLES:
        if match := pattern.fullmatch(unit):
            return match.expand(role)
    raise ValueError(f"{unit} is no unit of the DiT; expected one of lowvram_quantize.units")
