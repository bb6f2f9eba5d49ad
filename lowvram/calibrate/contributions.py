"""Contributions: what the int8 of single layers costs the DiT's output, measured on a short run in full precision.

The first block of a video is made as ``infer`` does, from an artifact that is not quantized. Then one unit of Linears
after the other is put in int8, the sink is filled and every step of the block is taken again, from the latent that it
began with: how far the output moves is what the unit's int8 costs. Errors of units add up as if they had
nothing to do with each other (``benchmarks/sensitivity.py`` shows how well), so that each has a part in the square of
the error of the whole. It cannot be done the other way, one unit restored in an int8 artifact: all that is quantized
behind it is rounded otherwise then, which moves the output more than most units do.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from lowvram.denoise.rollout import Rollout
from lowvram.devices import choose_device
from lowvram.offload.placement import MemoryOptions
from lowvram.pipeline import AvatarPipeline, Inputs, Request
from lowvram.progress import BlockProgress
from lowvram.schedule import Block
from lowvram_kernels.errors import CheckpointError
from lowvram_kernels.linear import linear_w8a8
from lowvram_kernels.rows import quantize_rows
from lowvram_models.names import dit_slab
from lowvram_quantize.format import Artifact, Component

Tensor = torch.Tensor
EXACT = ("bf16", "fp32")


class Preparation(Protocol):
    """How weights are prepared for int8."""

    def int8(self, name: str) -> tuple[int, Tensor | None]:
        """How many input channels of a weight are rotated together (1: none), and the factors [K] that they are divided
        by before; None where they are not."""
        ...


def contributions(
    artifact: Artifact,
    preparation: Preparation,
    inputs: Request | Inputs,
    units: Mapping[str, Sequence[str]],
    *,
    device: str = "auto",
    memory: MemoryOptions | None = None,
    quiet: bool = False,
) -> dict[str, float]:
    """By unit the part of its int8 in the square of the relative error of the DiT's output: of all steps of the first
    block.

    Args:
        artifact: whose DiT is bf16 or fp32.
        inputs: what to make, of which the first block is.
        units: names of weights that are put in int8 together.
        device: auto, cpu, cuda or cuda:N; what fits is planned as for ``infer``, within the budgets of ``memory``.

    Raises:
        CheckpointError: its DiT is of another precision, or as of ``AvatarPipeline``.
        LowvramError: as of ``AvatarPipeline.stream``.
    """
    component = artifact.component("dit")
    if component.precision not in EXACT or artifact.shape_values is not None:
        raise CheckpointError(
            f"{artifact.path} has a DiT in {artifact.shape_values or component.precision}; expected one in bf16 or "
            "fp32, in which one layer after the other is put in int8: convert the same checkpoint with --dit bf16 first"
        )
    where = choose_device(device)
    # One step in a pass: those of a second block would come between.
    pipeline = AvatarPipeline(artifact, where, memory=dataclasses.replace(memory or MemoryOptions(), wave=1))
    with BlockProgress("measuring layers", len(units), where, enabled=not quiet, units="of them") as progress:
        taken = _Block(_Int8(component, preparation), units, progress)
        with contextlib.closing(pipeline.denoise(inputs, taken.begun)) as denoised:
            next(denoised)
    pipeline.runtime.engine.empty_cache()
    return taken.parts


class _Int8:
    """Linears of an artifact in int8, made of its weights one at a time."""

    def __init__(self, component: Component, preparation: Preparation):
        self._component, self._preparation = component, preparation

    def of(self, name: str, layer: nn.Module, device: torch.device) -> nn.Module:
        component, (group, factors) = self._component, self._preparation.int8(name)
        slab = dit_slab(name, component.config["audio_inject_layers"])
        weight = component.views(slab, component.read_slab(slab))[name].to(device).float()
        smooth = None if factors is None else factors.to(weight)
        q, scale = quantize_rows(weight if smooth is None else weight / smooth, torch.int8, group=group)
        return _InInt8(layer, q, scale[:, 0], group, smooth)


class _InInt8(nn.Module):
    """Computes what ``layer`` would with its weight in int8, under the same names of parameters, so that streamed ones
    are bound to it. It is no QuantizedLinear: rows come unquantized."""

    def __init__(self, layer: nn.Module, q_NK: Tensor, scale_N: Tensor, group: int, smooth_K: Tensor | None):
        super().__init__()
        self._parameters = layer._parameters
        # In no list of parameters or buffers.
        self._stored, self._how = (q_NK, scale_N), (group, smooth_K)

    def forward(self, x: Tensor) -> Tensor:
        bias, (group, smooth) = self._parameters["bias"], self._how
        return linear_w8a8(
            x,
            *self._stored,
            None if bias is None else bias.to(x.dtype),
            group=group,
            smooth_K=None if smooth is None else smooth.to(x.dtype),
        )


class _Block:
    """The first block, whose steps are kept while they are taken, and taken again behind the last."""

    def __init__(self, int8: _Int8, units: Mapping[str, Sequence[str]], progress: BlockProgress):
        self._int8, self._units, self._progress = int8, units, progress
        self._before: dict[int, Tensor] = {}
        self._seen: dict[int, Tensor] = {}
        self._sink_is_exact = True
        self.parts: dict[str, float] = {}

    def begun(self, rollout: Rollout, _blocks: int) -> None:
        real = rollout.advance

        def advance(items: Any) -> None:
            ((block, step),) = items
            if not self._sink_is_exact:  # memory ran out while it was measured, and this is done again
                self._fill_sink(rollout, exactly=True)
            before = rollout.latents()[block.index]
            real([(block, step)])
            self._before[step] = before
            if step == rollout.steps[-1]:
                after, exact = rollout.latents(), dict(self._seen)
                self.parts = dict(self._measured(rollout, block, exact, real))
                rollout.begin_again(after)

        rollout.on_prediction = self._predicted
        rollout.advance = advance  # type: ignore[method-assign]

    def _predicted(self, _block: Block, step: int, velocity: Tensor) -> None:
        self._seen[step] = velocity.clone()

    def _measured(
        self, rollout: Rollout, block: Block, whole: dict[int, Tensor], advance: Any
    ) -> Iterator[tuple[str, float]]:
        size = sum(_energy(velocity) for velocity in whole.values())
        for index, (unit, names) in enumerate(self._units.items()):
            self._progress.update(index)
            with _in_int8(rollout, names, self._int8):
                self._fill_sink(rollout, exactly=False)
                for step, latent in self._before.items():
                    rollout.begin_again({block.index: latent})
                    advance([(block, step)])
            moved = sum(_energy(self._seen[step] - velocity) for step, velocity in whole.items())
            yield unit, moved / size if size else 0.0
        self._fill_sink(rollout, exactly=True)
        self._progress.update(len(self._units))

    def _fill_sink(self, rollout: Rollout, *, exactly: bool) -> None:
        self._sink_is_exact = False
        assert rollout.filled_from is not None
        rollout.prefill(*rollout.filled_from)
        self._sink_is_exact = exactly


@contextlib.contextmanager
def _in_int8(rollout: Rollout, names: Sequence[str], int8: _Int8) -> Iterator[None]:
    before = {}
    try:
        for name in names:
            path = name.removesuffix(".weight")
            before[path] = layer = rollout.dit.get_submodule(path)
            rollout.dit.set_submodule(path, int8.of(name, layer, rollout.device))
        rollout.forget_derived()
        yield
    finally:
        for path, layer in before.items():
            rollout.dit.set_submodule(path, layer)
        rollout.forget_derived()


def _energy(values: Tensor) -> float:
    return float(values.double().square().sum())
