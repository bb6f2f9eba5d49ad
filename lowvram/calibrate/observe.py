"""Observation of a run: what every Linear of the DiT's layers is given, before it is quantized; all else is as ever."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lowvram.calibrate.activations import Sampler, Watched
from lowvram.denoise.rollout import Rollout
from lowvram.pipeline import AvatarPipeline, Inputs, Request
from lowvram.progress import BlockProgress
from lowvram_kernels.modules import QuantizedLinear
from lowvram_models.dit import CausalDiT
from lowvram_quantize.format import Component

Tensor = torch.Tensor
_LAYERS = ("blocks.", "audio_injector.")


class WatchedLinear(nn.Module):
    """Computes what ``layer`` does, under the same names of parameters. It is no QuantizedLinear, so that a fused block
    hands it rows that nobody has quantized yet."""

    _layer: Callable[[Tensor], Tensor]

    def __init__(self, layer: nn.Module, watched: Watched, sampler: Sampler):
        super().__init__()
        self._parameters = layer._parameters  # what is bound to one is bound to the other
        self._watched, self._sampler = watched, sampler
        # In no module's list, where it would give the parameters longer names.
        object.__setattr__(self, "_layer", layer)

    def forward(self, x: Tensor) -> Tensor:
        self._watched.add(*self._sampler(x))
        return self._layer(x)


def watchable(component: Component) -> list[str]:
    """Names of the weights whose Linears are watched: those that run over tokens in every layer, whatever they are
    stored as."""
    names = []
    for slab in component.slab_names:
        for spec in component.slab_specs(slab):
            if spec.name.startswith(_LAYERS) and spec.name.endswith(".weight") and len(spec.shape) == 2:
                names.append(spec.name)
    order = {name: place for place, name in enumerate(component.facts["tensors"])}
    return sorted(names, key=lambda name: order[name])


def observe(pipeline: AvatarPipeline, inputs: Request | Inputs, *, quiet: bool = False) -> dict[str, Watched]:
    """Let the artifact denoise ``inputs``, every step of every block; what each Linear was given, by its weight's name.

    Raises:
        LowvramError: as of ``AvatarPipeline.stream``.
    """
    watched = {name: Watched() for name in watchable(pipeline.runtime.artifact.component("dit"))}
    with contextlib.ExitStack() as stack:
        shown: list[BlockProgress] = []

        def begun(rollout: Rollout, blocks: int) -> None:
            watch(rollout.dit, watched)
            bar = BlockProgress("calibrating", blocks, pipeline.runtime.device, enabled=not quiet)
            shown.append(stack.enter_context(bar))

        denoised = stack.enter_context(contextlib.closing(pipeline.denoise(inputs, begun)))
        for block, _ in denoised:
            shown[0].update(block.index + 1)
    pipeline.runtime.engine.empty_cache()
    return watched


def watch(dit: CausalDiT, watched: dict[str, Watched]) -> None:
    """Let each Linear whose weight is in ``watched`` note there what it is given from here on."""
    sampler = Sampler()
    for name, one in watched.items():
        path = name.removesuffix(".weight")
        layer: Any = dit.get_submodule(path)
        if not isinstance(layer, nn.Linear | QuantizedLinear):
            raise TypeError(f"{path} is a {type(layer).__name__}; only Linears can be watched")
        dit.set_submodule(path, WatchedLinear(layer, one, sampler))
