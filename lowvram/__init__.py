"""Talking-avatar video on the cards people own: convert once, infer within a stated memory.

>>> from lowvram import AvatarPipeline, Request, convert
>>> convert("ckpt/Wan2.2-S2V-14B", "live-avatar-int8", lora="ckpt/LiveAvatar/liveavatar.safetensors")
>>> pipeline = AvatarPipeline.from_artifact("live-avatar-int8")
>>> for frames in pipeline.stream(Request(image="me.jpg", audio="hello.wav", prompt="A person speaks")):
...     show(frames)  # uint8 [k, H, W, 3]
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# Read by PyTorch when it first allocates on a GPU. Plans fill a card to the last page, and without it the holes between
# blocks of hundreds of MB cost most of a GB (measured on the simulated device). What the user has set is left alone.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

if TYPE_CHECKING:
    from lowvram.offload.placement import MemoryOptions as MemoryOptions
    from lowvram.pipeline import AvatarPipeline as AvatarPipeline
    from lowvram.pipeline import Request as Request
    from lowvram_quantize.convert import convert as convert

__all__ = ["AvatarPipeline", "MemoryOptions", "Request", "convert"]

_HOMES = {
    "AvatarPipeline": "lowvram.pipeline",
    "MemoryOptions": "lowvram.offload.placement",
    "Request": "lowvram.pipeline",
    "convert": "lowvram_quantize.convert",
}


def __getattr__(name: str) -> Any:
    # torch, diffusers and transformers take seconds to import: not before one of the names is used.
    if name not in _HOMES:
        raise AttributeError(f"module 'lowvram' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
