"""Weights of an artifact: construct models on ``meta``, swap in 8-bit layers as metadata says, bind the tensors."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lowvram.loading.fused_block import fuse
from lowvram_kernels.errors import CheckpointError
from lowvram_kernels.modules import Attention, swap_conv, swap_linear
from lowvram_models.attention import CrossAttention
from lowvram_models.config import DiTConfig
from lowvram_models.dit import CausalDiT
from lowvram_models.names import SHARED, START
from lowvram_models.vae_order import channels_last, last_of
from lowvram_quantize.format import Component

Tensor = torch.Tensor
log = logging.getLogger(__name__)

STORAGE = {
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
    "int8_weight_only": torch.int8,
    "fp8_weight_only": torch.float8_e4m3fn,
}


def build_dit(component: Component) -> CausalDiT:
    """The DiT without weights (on ``meta``), its quantized layers and the attention dispatcher swapped in."""
    with torch.device("meta"):
        dit = CausalDiT(_dit_config(component.config))
    swap_quantized(dit, component)
    for module in dit.modules():
        if isinstance(module, CrossAttention):
            module.attention = Attention()
    fuse(dit)
    return dit.eval().requires_grad_(False)


def _dit_config(values: dict[str, Any]) -> DiTConfig:
    try:
        return DiTConfig.from_dict(values)
    except ValueError as error:
        raise CheckpointError(f"the artifact's DiT configuration cannot be used: {error}") from error


def swap_quantized(model: nn.Module, component: Component) -> None:
    """Replace every layer whose weight the artifact holds in 8 bit."""
    for name in component.tensor_names:
        dtype = STORAGE.get(component.tensor_scheme(name))
        if dtype is None or not name.endswith(".weight"):
            continue
        path = name.removesuffix(".weight")
        layer = model.get_submodule(path)
        if isinstance(layer, nn.Linear):
            _swap_linear(model, path, dtype, component.tensor_group(name), component.tensor_smoothed(name))
        else:
            swap_conv(layer, dtype)


def _swap_linear(model: nn.Module, path: str, dtype: torch.dtype, group: int, smooth: bool) -> None:
    try:
        swap_linear(model, path, dtype, group=group, smooth=smooth)
    except ValueError as error:
        raise CheckpointError(f"the artifact's {path} cannot be used: {error}; convert it again") from error


def bind(model: nn.Module, views: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Make ``views`` the model's parameters, without a copy where they already are in the dtype to compute in.

    8-bit weights and their scales are kept as stored; everything else becomes ``dtype``.
    """
    for name, tensor in views.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if leaf not in module._parameters:
            raise CheckpointError(f"the artifact holds {name}, which the model does not have; convert it again")
        values = tensor.to(dtype) if converted(name, tensor.dtype, dtype) else tensor
        module._parameters[leaf] = nn.Parameter(values, requires_grad=False)


def unbind(model: nn.Module, names: Iterable[str]) -> None:
    """Let go of parameters: they are as absent as before they were bound."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        bound = module.get_parameter(leaf)
        with torch.device("meta"):
            absent = torch.empty(bound.shape, dtype=bound.dtype)
        module._parameters[leaf] = nn.Parameter(absent, requires_grad=False)


def converted(name: str, stored: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether ``bind`` makes a copy of a tensor that is ``stored`` so, because ``dtype`` is what is computed in."""
    return not (stored in (torch.int8, torch.float8_e4m3fn) or name.endswith(".weight_scale") or stored is dtype)


def load_slabs(
    model: nn.Module, component: Component, device: torch.device, dtype: torch.dtype, *, last: bool = False
) -> None:
    """Load every slab of a component; with ``last``, weights of convolutions channels-last, as newer artifacts have
    them."""
    check_complete(model, component)
    for slab in component.slab_names:
        views = component.views(slab, component.read_slab(slab).to(device))
        if last:
            views = {
                name: turned(view, owned=device.type != "cpu") if _of_convolution(model, name) else view
                for name, view in views.items()
            }
        bind(model, views, dtype)


def _of_convolution(model: nn.Module, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    return leaf == "weight" and isinstance(model.get_submodule(path), nn.Conv2d | nn.Conv3d)


def turned(weight: Tensor, *, owned: bool) -> Tensor:
    """A convolution's weight [N, K, ...] channels-last. One that lies otherwise is turned in its own memory where that
    is ``owned``: as a part of a slab on a device, which stays as long as any of it is used, so that copies would come
    on top. The host's slabs are a file that cannot be written to."""
    ordered = channels_last(weight)
    if not owned or weight.is_contiguous(memory_format=last_of(weight)):
        return ordered
    rows, channels, *kernel = weight.shape
    memory = weight.view(rows, *kernel, channels)
    memory.copy_(ordered.movedim(1, -1))
    return channels_last(memory.movedim(-1, 1))


def check_complete(model: nn.Module, component: Component) -> None:
    """Raises: CheckpointError where the artifact's tensor names are not those of the model."""
    stored, wanted = set(component.tensor_names), {name for name, _ in model.named_parameters()}
    if stored != wanted:
        lacking, beyond = sorted(wanted - stored), sorted(stored - wanted)
        raise CheckpointError(
            f"{component.path} lacks {len(lacking)} tensors of the model {lacking[:2]} and has {len(beyond)} that are "
            f"not its own {beyond[:2]}; convert the checkpoint again with this version"
        )


def load_shared(model: nn.Module, component: Component, device: torch.device, dtype: torch.dtype) -> None:
    """Load what belongs to no single layer: embeddings, head, audio encoder."""
    load_start(model, component, device, dtype)
    bind(model, component.views(SHARED, component.read_slab(SHARED).to(device)), dtype)


def load_start(model: nn.Module, component: Component, device: torch.device, dtype: torch.dtype) -> None:
    """Load what a rollout needs only to be set up; see ``drop_start``."""
    bind(model, component.views(START, component.read_slab(START).to(device)), dtype)


def drop_start(model: nn.Module, component: Component) -> None:
    """Let go of what a rollout needs only to be set up: the embeddings of timesteps and text, 0.46 GB of the 14B."""
    unbind(model, [spec.name for spec in component.slab_specs(START)])
