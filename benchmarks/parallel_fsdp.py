"""The DiT under torch's ``fully_shard``, with the denoising steps that ours takes: ``parallel.py`` compares with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from lowvram.denoise.denoiser import Denoiser
from lowvram.denoise.rollout import Rollout
from lowvram.loading.weights import bind, build_dit, load_shared
from lowvram.offload.layers import layer_slab


class Root(nn.Module):
    """What FSDP takes for the model: everything that uses its parameters runs inside its forward."""

    def __init__(self, dit: nn.Module):
        super().__init__()
        self.dit = dit

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()


class Gathered:
    """Stands for ``lowvram.offload.layers.Layers``: FSDP's hooks make a block's weights present."""

    def __init__(self, count: int):
        self.count = count

    def place(self, streamed: Iterable[int], slots: int) -> None: ...

    def enter(self, index: int) -> None: ...

    def leave(self, index: int) -> None: ...


class FsdpRollout(Rollout):
    root: Root

    def prefill(self, *args: Any) -> None:
        self.root(lambda: super(FsdpRollout, self).prefill(*args))

    def start(self, *args: Any, **conditions: Any) -> None:
        self.root(lambda: super(FsdpRollout, self).start(*args, **conditions))

    def advance(self, *args: Any) -> None:
        self.root(lambda: super(FsdpRollout, self).advance(*args))


class FsdpDenoiser(Denoiser):
    """The same steps of the same blocks with the DiT under ``fully_shard``, as the published multi-GPU path has it:
    each block of the DiT is a unit, all else the root's, and tokens and heads are shared among the ranks."""

    def _load(self) -> FsdpRollout:
        runtime, device = self._runtime, self._runtime.device
        component = runtime.artifact.component("dit")
        # Parameters made in inference mode could not be sharded.
        with torch.inference_mode(False):
            dit = build_dit(component)
            group = dist.new_group(backend="nccl" if device.type == "cuda" else "gloo")
            mesh = DeviceMesh.from_group(group, device.type)
            load_shared(dit, component, device, runtime.dtype)
            for index, block in enumerate(dit.blocks):
                slab = component.read_slab(layer_slab(index)).to(device)
                bind(dit, component.views(layer_slab(index), slab), runtime.dtype)
                del slab
                fully_shard(block, mesh=mesh)
            root = fully_shard(Root(dit), mesh=mesh)
        self.shards = list(root.parameters())
        rollout = root(
            lambda: FsdpRollout(
                dit,
                Gathered(len(dit.blocks)),
                self._conditions.context,
                self.settings,
                dtype=runtime.dtype,
                engine=runtime.engine,
                placement=self._run.rung.placement,
                sequence=self._team.sequence,
                steps=self.steps,
            )
        )
        rollout.root = root
        return rollout
