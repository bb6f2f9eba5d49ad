"""Trajectories: what a baseline did in every step of every block, for a candidate to be teacher-forced and scored by.

Shapes: S steps, C latent channels, F latent frames, h x w latent size; N layers, K sampled tokens, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch

from lowvram.schedule import Block
from lowvram_kernels.errors import InputError

if TYPE_CHECKING:
    from lowvram.denoise.rollout import Rollout

Tensor = torch.Tensor

SAMPLED_TOKENS = 32
"""Of each step of the first and the last block: of the published model 27 MB a step in float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trajectory:
    """One block, on the host in float32: ``before`` [S, C, F, h, w] each step, the ``velocities`` [S, C, F, h, w] that
    the DiT gave, and the latent at the ``end`` [C, F, h, w]; ``layers`` [S, N + 1, K, D], where they were kept: the
    sampled tokens before the first layer and after each."""

    before: Tensor
    velocities: Tensor
    end: Tensor
    layers: Tensor | None = None


class Teacher(Protocol):
    """All trajectories: of the first ``blocks`` of a video of ``total`` blocks, ``steps`` each."""

    @property
    def blocks(self) -> int: ...

    @property
    def total(self) -> int: ...

    @property
    def steps(self) -> int: ...

    def trajectory(self, block: int) -> Trajectory:
        """Of one block, read where it is kept."""
        ...


@dataclasses.dataclass
class Trajectories:
    """In memory: two latents a block and step."""

    total: int = 0
    steps: int = 0
    kept: dict[int, Trajectory] = dataclasses.field(default_factory=dict)

    @property
    def blocks(self) -> int:
        return len(self.kept)

    def trajectory(self, block: int) -> Trajectory:
        return self.kept[block]

    def watcher(self, *, limit: int | None = None) -> Watcher:
        """Keeps what a baseline does in its first ``limit`` blocks; see ``Watcher``."""
        return Watcher(self.kept.__setitem__, limit=limit, at_start=self._begin)

    def _begin(self, total: int, steps: int) -> None:
        self.total, self.steps = total, steps
        self.kept.clear()


def sampled_tokens(count: int) -> Tensor:
    """Which of ``count`` tokens are looked at between layers: up to ``SAMPLED_TOKENS``, the same ones everywhere."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:SAMPLED_TOKENS].sort().values


class Sampler:
    """Takes the sampled tokens out of what goes through the layers."""

    def __init__(self) -> None:
        self._rows: dict[tuple[int, torch.device], Tensor] = {}

    def __call__(self, x_LD: Tensor) -> Tensor:
        """[L, D] -> [K, D] float32 on the host."""
        key = len(x_LD), x_LD.device
        if key not in self._rows:
            self._rows[key] = sampled_tokens(len(x_LD)).to(x_LD.device)
        return kept(x_LD[self._rows[key]])


class Watcher:
    """Sees a baseline's rollout, and hands each of the first ``limit`` blocks (None: all) to ``keep`` when it has taken
    its last step. ``begun`` is for ``AvatarPipeline.stream`` and ``denoise``; ``at_start`` is told, then, how many
    blocks there are, and steps each.

    Raises, while the rollout runs:
        InputError: NaN or infinity, of which nothing can be learnt.
    """

    def __init__(
        self,
        keep: Callable[[int, Trajectory], object],
        *,
        limit: int | None = None,
        at_start: Callable[[int, int], object],
    ):
        self._keep, self._limit, self._at_start = keep, limit, at_start
        self._sampler = Sampler()

    def begun(self, rollout: Rollout, blocks: int) -> None:
        self._steps, self._blocks = len(rollout.steps), min(blocks, self._limit or blocks)
        self._before: dict[int, dict[int, Tensor]] = {}
        self._velocities: dict[int, dict[int, Tensor]] = {}
        self._layers: dict[int, dict[int, list[Tensor]]] = {}
        rollout.on_prediction, rollout.on_latent, rollout.on_layer = self._predicted, self._seen, self._passed
        self._at_start(blocks, self._steps)

    def _predicted(self, block: Block, step: int, velocity: Tensor) -> None:
        if block.index < self._blocks:
            self._velocities.setdefault(block.index, {})[step] = kept(velocity)

    def _passed(self, block: Block, step: int, count: int, x_LD: Tensor) -> None:
        if block.index in (0, self._blocks - 1):
            # A pass that failed is repeated, and what it left is replaced.
            of_step = self._layers.setdefault(block.index, {})
            of_step[step] = [*of_step.get(step, [])[:count], self._sampler(x_LD)]

    def _seen(self, block: Block, step: int, latent: Tensor) -> Tensor:
        if block.index >= self._blocks:
            return latent
        if step < self._steps:
            self._before.setdefault(block.index, {})[step] = kept(latent)
            return latent
        before, velocities = (_stacked(of.pop(block.index)) for of in (self._before, self._velocities))
        layers = self._layers.pop(block.index, None)
        trajectory = Trajectory(
            before=before,
            velocities=velocities,
            end=kept(latent),
            layers=_stacked({at: torch.stack(passed) for at, passed in layers.items()}) if layers else None,
        )
        if not (velocities.isfinite().all() and trajectory.end.isfinite().all()):
            raise InputError(
                f"block {block.index} of the baseline holds NaN or infinity: nothing can be learnt from it; look at "
                "the artifact it was made with"
            )
        self._keep(block.index, trajectory)
        return latent


def kept(tensor: Tensor) -> Tensor:
    """A copy on the host, in float32."""
    return tensor.detach().to("cpu", torch.float32, copy=True)


def _stacked(by_step: dict[int, Tensor]) -> Tensor:
    return torch.stack([by_step[step] for step in sorted(by_step)])
