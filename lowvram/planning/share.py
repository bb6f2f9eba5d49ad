"""Share that one rank has of a run: its denoising steps, its heads, its tokens, and whether it encodes and decodes."""

from __future__ import annotations

import dataclasses

from lowvram.planning.rank_layout import ParallelLayout, Role, shares
from lowvram.planning.workload import Workload
from lowvram_models.config import DiTConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """``steps`` are the denoising steps that run here, counted from a block's first. Of ``parts`` ranks with the same
    steps this one computes ``block_tokens`` of a block's tokens and ``sink_tokens`` of the sink's, and attends with
    ``heads``, over all tokens. The VAE's own rank has none of these."""

    role: Role
    steps: range
    parts: int
    heads: int
    block_tokens: int
    sink_tokens: int

    @property
    def denoises(self) -> bool:
        return self.role.denoises

    @property
    def media(self) -> bool:
        """Whether it encodes and decodes."""
        return self.role.media

    @property
    def exchanges(self) -> bool:
        """Whether tokens and heads go to and fro around self-attention."""
        return self.parts > 1


def share_of(config: DiTConfig, work: Workload, layout: ParallelLayout, rank: int) -> Share:
    """The share of one rank: a share of the tokens of every latent frame, and of the heads."""
    role, parts = layout.role(rank), layout.ulysses_size
    if role.stage is None or role.index is None:
        return Share(role=role, steps=range(0), parts=1, heads=0, block_tokens=0, sink_tokens=0)
    return Share(
        role=role,
        steps=layout.steps(role.stage, work.sample_steps),
        parts=parts,
        heads=shares(config.num_heads, parts)[role.index],
        block_tokens=shares(work.tokens_per_frame, parts)[role.index] * work.frames_per_block,
        sink_tokens=shares(work.sink_tokens, parts)[role.index],
    )


def whole(config: DiTConfig, work: Workload) -> Share:
    """One rank does everything."""
    return share_of(config, work, ParallelLayout(), 0)
