"""Rotary position embedding over (time, row, column), as complex rotation of neighbouring channel pairs.

Source: model-spec section 5 (LiveAvatar, ``causal_s2v_utils``). Angles are computed in float64 and cos/sin kept in
float32: the reference rounds them to float16 on the GPU, which costs a relative 5e-4 for nothing.
"""

from __future__ import annotations

import dataclasses

import torch

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class Rope:
    """cos and sin, float32 [tokens, head_dim / 2]."""

    cos: Tensor
    sin: Tensor

    def to(self, device: torch.device | str) -> Rope:
        return Rope(self.cos.to(device), self.sin.to(device))


def inverse_frequencies(head_dim: int) -> tuple[Tensor, Tensor]:
    """Frequencies (time pairs, space pairs), float64; rows and columns share the second."""
    time_dim = head_dim - 4 * (head_dim // 6)
    space_dim = 2 * (head_dim // 6)
    time = 10000.0 ** (-torch.arange(0, time_dim, 2, dtype=torch.float64) / time_dim)
    space = 10000.0 ** (-torch.arange(0, space_dim, 2, dtype=torch.float64) / space_dim)
    return time, space


def rope_table(time: Tensor, rows: Tensor, columns: Tensor, head_dim: int) -> Rope:
    """Rotations of the grid time x rows x columns, flattened in this order; positions are any real numbers."""
    time_freq, space_freq = inverse_frequencies(head_dim)
    grid = torch.meshgrid(time.double(), rows.double(), columns.double(), indexing="ij")
    t, y, x = (axis.reshape(-1, 1) for axis in grid)
    angle = torch.cat([t * time_freq, y * space_freq, x * space_freq], dim=1)
    return Rope(angle.cos().float(), angle.sin().float())


def join(*tables: Rope) -> Rope:
    return Rope(torch.cat([t.cos for t in tables]), torch.cat([t.sin for t in tables]))


def block_rope(first_frame: int, frames: int, rows: int, columns: int, head_dim: int) -> Rope:
    """Rotations of a block's noisy tokens; ``first_frame`` counts latent frames from the start of the video."""
    time = torch.arange(first_frame, first_frame + frames)
    return rope_table(time, torch.arange(rows), torch.arange(columns), head_dim)


def condition_rope(rows: int, columns: int, head_dim: int, reference_time: int = 30) -> Rope:
    """Rotations of the sink's tokens: the reference frame, then motion at 1x, 2x and 4x.

    ``rows`` and ``columns`` are tokens of a latent frame (latent size / 2).
    """
    y, x = torch.arange(rows), torch.arange(columns)
    reference = rope_table(torch.tensor([reference_time]), y, x, head_dim)
    last = rope_table(torch.tensor([-1]), y, x, head_dim)
    packed2 = rope_table(torch.tensor([-3]), _thinned(rows, rows // 2), _thinned(columns, columns // 2), head_dim)
    packed4 = rope_table(
        torch.tensor([-19, -14, -9, -4]), _thinned(rows, rows // 4), _thinned(columns, columns // 4), head_dim
    )
    return join(reference, last, packed2, packed4)


def _thinned(size: int, count: int) -> Tensor:
    # Truncated as the reference does it, where the last position is size - 1 and the ones between are uneven.
    return torch.linspace(0, size - 1, count, dtype=torch.float64).trunc()


def reference_time(first_frame: int, distance: int) -> int:
    """Time position at which a block that starts at latent frame ``first_frame`` sees the reference frame."""
    return 30 + max(0, first_frame - (30 - distance))


def apply_rope(x_LNH: Tensor, rope: Rope) -> Tensor:
    """Rotate [tokens, heads, head_dim]; computed in float32, returned in the input's dtype."""
    even, odd = x_LNH.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope.cos[:, None], rope.sin[:, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x_LNH.dtype)
