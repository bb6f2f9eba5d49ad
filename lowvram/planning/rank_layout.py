"""Layout of ranks: ``num_gpus_dit = stages x ulysses_size`` of them denoise, one more may encode and decode; and the
share of steps, heads and tokens that each has.

Everything here follows from plain numbers, so that every rank comes to the same layout by itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from lowvram.planning.workload import Workload
from lowvram_kernels.errors import ConfigError
from lowvram_models.config import DiTConfig

# From so many ranks on, one of them is left to the VAE unless told otherwise.
RANKS_WITH_VAE = 4


def shares(total: int, parts: int) -> tuple[int, ...]:
    """``total`` in ``parts`` whole shares, as even as can be, the larger ones first: 40 in 3 are 14, 13, 13."""
    return tuple(total // parts + (part < total % parts) for part in range(parts))


def span(total: int, parts: int, part: int) -> range:
    """The indices of one of the ``shares``."""
    before = sum(shares(total, parts)[:part])
    return range(before, before + shares(total, parts)[part])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Role:
    """What one rank does. ``stage`` and ``index`` (its place among the stage's ``ulysses_size`` ranks) are None for the
    VAE's own rank. ``media`` is the one rank that reads portrait and voice, encodes, decodes and writes."""

    rank: int
    stage: int | None
    index: int | None
    media: bool

    @property
    def denoises(self) -> bool:
        return self.stage is not None

    @property
    def name(self) -> str:
        """For messages and tables."""
        where = "VAE" if self.stage is None else f"stage {self.stage}, part {self.index}"
        return f"rank {self.rank} ({where})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """Ranks 0 .. num_gpus_dit - 1 denoise, stage by stage; with ``vae_rank`` one more follows.

    Stage s takes its share of the denoising steps; inside a stage each of ``ulysses_size`` ranks has a share of the
    tokens of every latent frame, and of the heads in attention. Validated at construction.
    """

    num_gpus_dit: int = 1
    ulysses_size: int = 1
    vae_rank: bool = False

    def __post_init__(self) -> None:
        if self.num_gpus_dit < 1 or self.ulysses_size < 1 or self.num_gpus_dit % self.ulysses_size:
            raise ConfigError(
                f"--num_gpus_dit {self.num_gpus_dit} and --ulysses_size {self.ulysses_size} make no whole number of "
                "stages; expected num_gpus_dit = stages x ulysses_size"
            )

    @property
    def stages(self) -> int:
        return self.num_gpus_dit // self.ulysses_size

    @property
    def world_size(self) -> int:
        return self.num_gpus_dit + self.vae_rank

    @property
    def media_rank(self) -> int:
        """The VAE's rank, or else the first rank of the last stage: latents end there."""
        return self.num_gpus_dit if self.vae_rank else self.num_gpus_dit - self.ulysses_size

    def role(self, rank: int) -> Role:
        denoises, media = rank < self.num_gpus_dit, rank == self.media_rank
        stage, index = divmod(rank, self.ulysses_size) if denoises else (None, None)
        return Role(rank=rank, stage=stage, index=index, media=media)

    def roles(self) -> list[Role]:
        return [self.role(rank) for rank in range(self.world_size)]

    def members(self, stage: int) -> range:
        """Ranks of a stage."""
        return range(stage * self.ulysses_size, (stage + 1) * self.ulysses_size)

    def steps(self, stage: int, sample_steps: int) -> range:
        """Denoising steps of a stage."""
        return span(sample_steps, self.stages, stage)

    def check(self, *, sample_steps: int, heads: int, tokens_per_frame: int) -> None:
        """Raises: ConfigError where a rank would have nothing to do."""
        if self.stages > sample_steps:
            raise ConfigError(
                f"{self.num_gpus_dit} DiT GPUs with --ulysses_size {self.ulysses_size} are {self.stages} stages for "
                f"{sample_steps} denoising steps; expected a step or more a stage: give a larger --ulysses_size"
            )
        if self.ulysses_size > min(heads, tokens_per_frame):
            raise ConfigError(
                f"--ulysses_size is {self.ulysses_size} for {heads} heads and {tokens_per_frame} tokens a latent "
                "frame; expected one of each or more a rank"
            )

    def words(self) -> str:
        """As "3 GPUs denoise (1 stage x 3), 1 decodes"."""
        stages = f"{self.stages} stage{'s' if self.stages > 1 else ''} x {self.ulysses_size}"
        return f"{self.num_gpus_dit} for the DiT ({stages})" + (", 1 for the VAE" if self.vae_rank else "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayoutOptions:
    """What a user says of how ranks share the work; None leaves it to the choice. Validated at construction."""

    num_gpus_dit: int | None = None
    ulysses_size: int | None = None
    enable_vae_parallel: bool | None = None

    def __post_init__(self) -> None:
        for name in ("num_gpus_dit", "ulysses_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name} is {value}; expected 1 or more")


def layouts(gpus: int, *, sample_steps: int, heads: int) -> Iterator[ParallelLayout]:
    """Every layout of so many GPUs, with and without a rank for the VAE."""
    for vae_rank in (False, True):
        dit = gpus - vae_rank
        for ulysses_size in range(1, dit + 1):
            if dit % ulysses_size == 0 and dit // ulysses_size <= sample_steps and ulysses_size <= heads:
                yield ParallelLayout(num_gpus_dit=dit, ulysses_size=ulysses_size, vae_rank=vae_rank)


def chosen_layout(gpus: int, options: LayoutOptions | None = None, *, sample_steps: int, heads: int) -> ParallelLayout:
    """The layout of ``gpus`` ranks, with what no option says chosen: 4 are 3 and one for the VAE, 5 are 4 and one, 1 to
    3 are all for the DiT. Of stages and ``ulysses_size`` those with the least work for the busiest rank; of equal ones
    more stages, which exchange nothing but latents.

    Raises:
        ConfigError: what is given does not add up to ``gpus``, or to nothing that works.
    """
    options = options or LayoutOptions()
    num_gpus_dit, ulysses_size, vae_rank = options.num_gpus_dit, options.ulysses_size, options.enable_vae_parallel
    if num_gpus_dit is not None and vae_rank is None:
        vae_rank = gpus == num_gpus_dit + 1
    vae_rank = gpus >= RANKS_WITH_VAE if vae_rank is None else vae_rank
    dit = gpus - vae_rank if num_gpus_dit is None else num_gpus_dit
    if dit + vae_rank != gpus:
        vae = " and one for the VAE (--enable_vae_parallel)" if vae_rank else ""
        fitting = f", or give --num_gpus_dit {gpus - vae_rank}" if gpus > vae_rank else ""
        raise ConfigError(
            f"{gpus} ranks were started, but --num_gpus_dit {dit}{vae} are {dit + vae_rank}; start as many "
            f"ranks{fitting}"
        )
    if ulysses_size is not None:
        return ParallelLayout(num_gpus_dit=dit, ulysses_size=ulysses_size, vae_rank=vae_rank)
    found = [
        layout
        for layout in layouts(gpus, sample_steps=sample_steps, heads=heads)
        if layout.vae_rank == vae_rank and layout.num_gpus_dit == dit
    ]
    if not found:
        raise ConfigError(
            f"{dit} GPUs for the DiT make no layout of {sample_steps} steps and {heads} heads; expected a number that "
            f"is stages x ulysses_size with up to {sample_steps} stages and up to {heads} ranks in each"
        )
    return min(found, key=lambda layout: (_busiest(layout, sample_steps, heads), layout.ulysses_size))


def _busiest(layout: ParallelLayout, sample_steps: int, heads: int) -> float:
    """Steps of the longest stage, as the rank with the most heads takes them."""
    return max(shares(sample_steps, layout.stages)) * max(shares(heads, layout.ulysses_size)) / heads


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
