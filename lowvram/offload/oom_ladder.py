"""What a run gives up, one rung at a time, when the device's memory ran out although the plan said it would not.

First speed: more layers streamed, rings to the host, decoding block by block, the picture decoded in tiles. Then, only
where that is allowed, quality: shorter clips, a smaller picture, fewer steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, TypeVar

from lowvram.media.sizes import parse_size
from lowvram.offload.placement import Placement

# Of all layers, and of all rings, that one rung moves.
_SHARE = 4
MOST_TILES = 8
_BLOCK_FRAMES = 12
_LEAST_AREA_PX = 256 * 256
_SHRINK = 0.8

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """All that can change while a run goes on."""

    placement: Placement
    online_decode: bool
    vae_tiles: int = 1


def next_rung(layout: Layout, layers: int, steps: range) -> tuple[Layout, str] | None:
    """The next slower layout and what it gives up, in words; None where nothing is left."""
    return next(_rungs(layout, layers, steps), None)


def _rungs(layout: Layout, layers: int, steps: range) -> Iterator[tuple[Layout, str]]:
    placement = layout.placement
    resident = [layer for layer in range(layers) if layer not in placement.streamed_layers]
    if resident:
        streamed = tuple(sorted((*placement.streamed_layers, *_some(resident, layers))))
        yield _moved(layout, streamed_layers=streamed), f"{len(streamed)} of {layers} layers are streamed now"
    cells = [(step, layer) for layer in range(layers) for step in steps]
    on_device = [cell for cell in cells if cell not in placement.host_rings]
    if on_device:
        hosted = tuple(sorted((*placement.host_rings, *_some(on_device, len(cells)))))
        yield _moved(layout, host_rings=hosted), f"{len(hosted)} of {len(cells)} KV rings are on the host now"
    if not layout.online_decode:
        yield dataclasses.replace(layout, online_decode=True), "each block is decoded at once now"
    if layout.vae_tiles < MOST_TILES:
        tiles = layout.vae_tiles * 2
        yield dataclasses.replace(layout, vae_tiles=tiles), f"frames are decoded in {tiles} tiles now"


def _some(there: list[_T], total: int) -> list[_T]:
    """A share of the whole, spread over what is there."""
    count = min(len(there), -(-total // _SHARE))
    return [there[(2 * i + 1) * len(there) // (2 * count)] for i in range(count)]


def _moved(layout: Layout, **changes: Any) -> Layout:
    return dataclasses.replace(layout, placement=dataclasses.replace(layout.placement, **changes))


def smaller_request(size: str, infer_frames: int, sample_steps: int) -> tuple[dict[str, Any], str] | None:
    """What of a request to change next where quality may be lost, and that in words; None at the end."""
    if infer_frames > _BLOCK_FRAMES:
        frames = max(_BLOCK_FRAMES, infer_frames // 2 // _BLOCK_FRAMES * _BLOCK_FRAMES)
        return {"infer_frames": frames}, f"clips of {frames} frames instead of {infer_frames}"
    sides = parse_size(size)
    if sides[0] * sides[1] > _LEAST_AREA_PX:
        a, b = (max(64, int(side * _SHRINK) // 16 * 16) for side in sides)
        return {"size": f"{a}*{b}"}, f"size {a}*{b} instead of {size}"
    if sample_steps > 1:
        return {"sample_steps": sample_steps - 1}, f"{sample_steps - 1} steps instead of {sample_steps}"
    return None
