"""Teacher forcing: a candidate takes every step from where the baseline took it, so that its errors do not add up.

Two rollouts of one seed drift apart, and then their distance says only that they are two takes. Here the real rollout
of the candidate runs with its own weights, conditions, KV rings and sink, but each step of each block begins with the
baseline's latent, and the sink is refreshed from the baseline's first frame: what differs is what one step costs.

Shapes: C latent channels, F latent frames, h x w latent size; L tokens, D width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterable
from typing import Any

import torch

from lowvram.compare.layer_errors import LayerErrors, LayerSums, Step
from lowvram.compare.metrics import TensorScore, TensorSums
from lowvram.compare.token_errors import UNCERTAINTY, Sample, Statistics, statistics
from lowvram.compare.trajectories import Sampler, Teacher, Trajectories, Trajectory, kept
from lowvram.denoise.rollout import Rollout
from lowvram.pipeline import AvatarPipeline, Begun, Inputs, Request
from lowvram.progress import BlockProgress
from lowvram.schedule import Block
from lowvram_kernels.errors import InputError

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepScore:
    """One step of one block: the DiT's output."""

    block: int
    step: int
    velocity: TensorScore


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forced:
    """A candidate, teacher-forced over the first of a baseline's ``total`` blocks or all of them: step by step in the
    order of blocks; the others are taken together: all velocities, those of each step and of each block, and the
    latents after all last steps. ``layers`` are of the blocks and steps that the baseline's were kept of,
    ``layers_by_step`` of each step; of none where none were. ``seconds`` it took, encoding and loading with it."""

    total: int
    each: tuple[StepScore, ...]
    velocity: Statistics
    by_step: tuple[Statistics, ...]
    by_block: tuple[TensorScore, ...]
    latents: TensorScore
    layers: LayerErrors | None = None
    layers_by_step: tuple[LayerErrors, ...] = ()
    layers_of: tuple[int, ...] = ()
    seconds: float = 0.0

    @property
    def values(self) -> dict[str, float]:
        """The single figures: relative errors of all velocities, of the first block's and of the worst block's; mean,
        median, 99 % and 99.9 % quantile and maximum of the relative error of single tokens; the lowest cosine of a step
        of a block, and the relative error of the latents after the last steps."""
        velocity = self.velocity
        return {
            "velocity_error": velocity.relative_error.value,
            "velocity_error_first": self.by_block[0].relative_error,
            "velocity_error_max": max(block.relative_error for block in self.by_block),
            **{
                f"token_error_{name}": getattr(velocity, name).value
                for name in ("mean", "median", "p99", "p999", "maximum")
            },
            "velocity_cosine": min(score.velocity.cosine for score in self.each),
            "latent_error": self.latents.relative_error,
        }

    def to_json(self) -> dict[str, Any]:
        """All of it but single steps of blocks: together, by step, by block and by layer."""
        return {
            "blocks": len(self.by_block),
            "of_blocks": self.total,
            "seconds": self.seconds,
            "uncertainty": UNCERTAINTY,
            "velocity": self.velocity.to_json(),
            "by_step": [{"step": step, **each.to_json()} for step, each in enumerate(self.by_step)],
            "by_block": [{"block": i, "relative_error": b.relative_error} for i, b in enumerate(self.by_block)],
            "latent_error": self.latents.relative_error,
            "layers_of_blocks": list(self.layers_of),
            "layers": self.layers.to_json() if self.layers else [],
            "layers_by_step": [{"step": i, "layers": each.to_json()} for i, each in enumerate(self.layers_by_step)],
        }


def record(
    baseline: AvatarPipeline, request: Request | Inputs, *, blocks: int | None = None, begun: Begun | None = None
) -> Trajectories:
    """Let the baseline denoise ``request`` freely, all of it or its first ``blocks``, and keep every step in memory.
    ``begun`` is shown the rollout, too.

    Raises:
        InputError: it gave NaN or infinity.
        LowvramError: as of ``AvatarPipeline.stream``.
    """
    trajectories = Trajectories()
    watcher = trajectories.watcher(limit=blocks)
    with contextlib.closing(baseline.denoise(request, _both(watcher.begun, begun))) as denoised:
        for block, _ in denoised:
            if block.index + 1 == blocks:
                break
    return trajectories


def force(
    candidate: AvatarPipeline,
    request: Request | Inputs,
    teacher: Teacher,
    *,
    blocks: int | None = None,
    quiet: bool = False,
    what: str = "teacher-forced",
    begun: Begun | None = None,
) -> Forced:
    """Let the candidate denoise the same ``request`` with the baseline's latents before every step, as far as those go
    or the first ``blocks``, and score what it makes of them. How far it is with ``what`` is shown on stderr unless it
    is ``quiet``. ``begun`` is shown the rollout, too.

    Raises:
        InputError: the baseline denoised something else: other blocks, another size, another number of steps; or the
            candidate gave NaN or infinity.
        LowvramError: as of ``AvatarPipeline.stream``.
    """
    begin = time.perf_counter()
    student = _Student(teacher, min(teacher.blocks, blocks or teacher.blocks))
    device = candidate.runtime.device
    with (
        BlockProgress(what, student.blocks, device, enabled=not quiet) as progress,
        contextlib.closing(candidate.denoise(request, _both(student.begun, begun))) as denoised,
    ):
        for block, _ in denoised:
            progress.update(block.index + 1)
            if block.index + 1 == student.blocks:
                break
    return student.scores(time.perf_counter() - begin)


def _both(first: Begun, second: Begun | None) -> Begun:
    def begun(rollout: Rollout, blocks: int) -> None:
        first(rollout, blocks)
        if second is not None:
            second(rollout, blocks)

    return begun


class _Student:
    """Of every step, while it is taken."""

    def __init__(self, teacher: Teacher, blocks: int):
        self._teacher, self.blocks = teacher, blocks
        self._trajectories: dict[int, Trajectory] = {}  # of blocks that are under way
        self._velocities: dict[Step, Sample] = {}
        self._latents: dict[int, TensorSums] = {}  # after the last step of each block
        self._layers, self._sampler = LayerSums(), Sampler()

    def begun(self, rollout: Rollout, blocks: int) -> None:
        teacher, steps = self._teacher, len(rollout.steps)
        if steps != teacher.steps:
            raise _other(f"{steps} steps", f"{teacher.steps}")
        if blocks != teacher.total:
            raise _other(f"{blocks} blocks", f"{teacher.total}")
        rollout.on_prediction, rollout.on_latent, rollout.on_layer = self._predicted, self._seen, self._passed

    def _predicted(self, block: Block, step: int, velocity: Tensor) -> None:
        if block.index < self.blocks:
            with _where(block.index, step):
                wanted = self._trajectory(block.index).velocities[step]
                self._velocities[block.index, step] = Sample.of(kept(velocity), wanted)

    def _passed(self, block: Block, step: int, count: int, x_LD: Tensor) -> None:
        if block.index < self.blocks and (layers := self._trajectory(block.index).layers) is not None:
            if count >= layers.shape[1]:
                raise InputError(
                    f"the candidate has {count} layers or more, the baseline had {layers.shape[1] - 1}: they are of "
                    "different models; compare artifacts of one checkpoint"
                )
            self._layers.add((block.index, step), count, self._sampler(x_LD), layers[step, count])

    def _seen(self, block: Block, step: int, latent: Tensor) -> Tensor:
        """The candidate's latent is that of its step before this one; the baseline's comes back."""
        if block.index >= self.blocks:
            return latent
        trajectory, last = self._trajectory(block.index), step == self._teacher.steps
        wanted = trajectory.end if last else trajectory.before[step]
        if latent.shape != wanted.shape:
            raise _other(f"latents {list(latent.shape)} of block {block.index}", f"{list(wanted.shape)}")
        if last:
            with _where(block.index, step - 1):
                sums = self._latents[block.index] = TensorSums()
                sums.add(kept(latent), wanted)
            del self._trajectories[block.index]
        return wanted.to(latent.device)

    def _trajectory(self, block: int) -> Trajectory:
        if block not in self._trajectories:
            self._trajectories[block] = self._teacher.trajectory(block)
        return self._trajectories[block]

    def scores(self, seconds: float) -> Forced:
        blocks, steps = range(self.blocks), range(self._teacher.steps)
        velocities, layered = self._velocities, self._layers.steps
        return Forced(
            total=self._teacher.total,
            each=tuple(
                StepScore(
                    block=block, step=step, velocity=velocities[block, step].sums.score(f"block {block}, step {step}")
                )
                for block in blocks
                for step in steps
            ),
            velocity=statistics([[velocities[block, step] for step in steps] for block in blocks]),
            by_step=tuple(statistics([[velocities[block, step]] for block in blocks]) for step in steps),
            by_block=tuple(
                _together(f"block {block}", (velocities[block, step].sums for step in steps)) for block in blocks
            ),
            latents=_together("latents", (self._latents[block] for block in blocks)),
            layers=self._layers.errors(layered) if layered else None,
            layers_by_step=tuple(
                self._layers.errors([at for at in layered if at[1] == step]) for step in (steps if layered else ())
            ),
            layers_of=tuple(sorted({block for block, _ in layered})),
            seconds=seconds,
        )


@contextlib.contextmanager
def _where(block: int, step: int) -> Any:
    """Says of which step it was that NaN or infinity came."""
    try:
        yield
    except ValueError as error:
        raise InputError(f"block {block}, step {step}: {error}; one of the runs went wrong") from error


def _together(name: str, parts: Iterable[TensorSums]) -> TensorScore:
    total = TensorSums()
    for part in parts:
        total.merge(part)
    return total.score(name)


def _other(here: str, there: str) -> InputError:
    return InputError(
        f"the candidate denoises {here}, the baseline did {there}: they are of different requests; give both the same "
        "portrait, voice, size, length and steps"
    )
