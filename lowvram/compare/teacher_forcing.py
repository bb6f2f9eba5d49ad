"""Teacher forcing: a candidate takes every step from where the baseline took it, so that its errors do not add up.

Two rollouts of one seed drift apart, and then their distance says only that they are two takes. Here the real rollout
of the candidate runs with its own weights, conditions, KV rings and sink, but each step of each block begins with the
baseline's latent, and the sink is refreshed from the baseline's first frame: what differs is what one step costs.

Shapes: C latent channels, F latent frames, h x w latent size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch

from lowvram.compare.metrics import TensorScore, TensorSums
from lowvram.denoise.rollout import Rollout
from lowvram.pipeline import AvatarPipeline, Inputs, Request
from lowvram.schedule import Block
from lowvram_kernels.errors import InputError

Tensor = torch.Tensor
Step = tuple[int, int]
"""(block, step), both counted from 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Taught:
    """What a baseline did, on the host in float32: of each step what it began with and the velocity that it gave, and
    what each block ended with; all [C, F, h, w]."""

    steps: int
    before: dict[Step, Tensor]
    velocities: dict[Step, Tensor]
    ends: dict[int, Tensor]

    def after(self, at: Step) -> Tensor:
        """What the step made of its latent."""
        block, step = at
        return self.ends[block] if step == self.steps - 1 else self.before[block, step + 1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepScore:
    """One step of one block: the DiT's output, and the latent that the step made of the baseline's."""

    block: int
    step: int
    velocity: TensorScore
    latent: TensorScore


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forced:
    """A candidate against the baseline that taught it, step by step in the order of blocks; the others are taken
    together: all velocities, those of each step and of each block, and the latents after all last steps."""

    each: tuple[StepScore, ...]
    velocity: TensorScore
    by_step: tuple[TensorScore, ...]
    by_block: tuple[TensorScore, ...]
    latents: TensorScore

    @property
    def values(self) -> dict[str, float]:
        """The single figures: relative errors of all velocities, of the first block's and of the worst block's, the
        lowest cosine of a step of a block, and the relative error of the latents after the last steps."""
        return {
            "velocity_error": self.velocity.relative_error,
            "velocity_error_first": self.by_block[0].relative_error,
            "velocity_error_max": max(block.relative_error for block in self.by_block),
            "velocity_cosine": min(score.velocity.cosine for score in self.each),
            "latent_error": self.latents.relative_error,
        }


def record(baseline: AvatarPipeline, request: Request | Inputs) -> Taught:
    """Let the baseline denoise all of ``request`` freely and keep every step, which takes memory for two latents a
    block and step.

    Raises:
        LowvramError: as of ``AvatarPipeline.stream``.
    """
    before: dict[Step, Tensor] = {}
    velocities: dict[Step, Tensor] = {}
    ends: dict[int, Tensor] = {}
    steps = 0

    def begun(rollout: Rollout) -> None:
        nonlocal steps
        steps = len(rollout.steps)
        rollout.on_prediction, rollout.on_latent = predicted, seen

    def predicted(block: Block, step: int, velocity: Tensor) -> None:
        velocities[block.index, step] = _kept(velocity)

    def seen(block: Block, step: int, latent: Tensor) -> Tensor:
        if step < steps:
            before[block.index, step] = _kept(latent)
        return latent

    for block, latent in baseline.denoise(request, begun):
        ends[block.index] = _kept(latent)
    return Taught(steps=steps, before=before, velocities=velocities, ends=ends)


def force(candidate: AvatarPipeline, request: Request | Inputs, taught: Taught) -> Forced:
    """Let the candidate denoise the same ``request`` with the baseline's latents before every step, and score what it
    makes of them.

    Raises:
        InputError: the baseline denoised something else: other blocks, another size, another number of steps.
        LowvramError: as of ``AvatarPipeline.stream``.
    """
    sums = _Sums(taught)

    def begun(rollout: Rollout) -> None:
        _check_steps(len(rollout.steps), taught)
        rollout.on_prediction, rollout.on_latent = sums.predicted, sums.seen

    blocks = 0
    for _ in candidate.denoise(request, begun):
        blocks += 1
    if blocks != len(taught.ends):
        raise _other(f"{blocks} blocks", f"{len(taught.ends)}")
    return sums.scores()


class _Sums:
    """Of every step, while it is taken."""

    def __init__(self, taught: Taught):
        self._taught = taught
        self._velocities: dict[Step, TensorSums] = {}
        self._latents: dict[Step, TensorSums] = {}

    def predicted(self, block: Block, step: int, velocity: Tensor) -> None:
        at = block.index, step
        self._velocities[at] = _sums(velocity, self._taught.velocities[at], at)

    def seen(self, block: Block, step: int, latent: Tensor) -> Tensor:
        """The candidate's latent is that of its step before this one; the baseline's comes back."""
        taught = self._taught
        if block.index not in taught.ends:
            raise _other(f"block {block.index}", f"{len(taught.ends)} blocks")
        wanted = taught.ends[block.index] if step == taught.steps else taught.before[block.index, step]
        if latent.shape != wanted.shape:
            raise _other(f"latents {list(latent.shape)} of block {block.index}", f"{list(wanted.shape)}")
        if step:
            at = block.index, step - 1
            self._latents[at] = _sums(latent, taught.after(at), at)
        return wanted.to(latent.device)

    def scores(self) -> Forced:
        blocks, steps = sorted(self._taught.ends), range(self._taught.steps)
        return Forced(
            each=tuple(
                StepScore(
                    block=block,
                    step=step,
                    velocity=self._velocities[block, step].score(f"block {block}, step {step}"),
                    latent=self._latents[block, step].score(f"block {block}, step {step}"),
                )
                for block in blocks
                for step in steps
            ),
            velocity=_together("velocities", self._velocities.values()),
            by_step=tuple(self._all(f"step {step}", [(block, step) for block in blocks]) for step in steps),
            by_block=tuple(self._all(f"block {block}", [(block, step) for step in steps]) for block in blocks),
            latents=_together("latents", (self._latents[block, steps[-1]] for block in blocks)),
        )

    def _all(self, name: str, chosen: Iterable[Step]) -> TensorScore:
        return _together(name, (self._velocities[at] for at in chosen))


def _sums(mine: Tensor, wanted: Tensor, at: Step) -> TensorSums:
    sums = TensorSums()
    try:
        sums.add(mine.detach().cpu(), wanted)
    except ValueError as error:
        raise InputError(f"block {at[0]}, step {at[1]}: {error}; one of the runs went wrong") from error
    return sums


def _together(name: str, parts: Iterable[TensorSums]) -> TensorScore:
    total = TensorSums()
    for part in parts:
        total.merge(part)
    return total.score(name)


def _check_steps(steps: int, taught: Taught) -> None:
    if steps != taught.steps:
        raise _other(f"{steps} steps", f"{taught.steps}")


def _other(here: str, there: str) -> InputError:
    return InputError(
        f"the candidate denoises {here}, the baseline did {there}: they are of different requests; give both the same "
        "portrait, voice, size, length and steps"
    )


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)
