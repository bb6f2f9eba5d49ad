"""A process that does once whatever takes memory of a card beside tensors, and prints the bytes by part as JSON.

Started by ``library_memory`` as ``python -m lowvram.selftest.library_memory_probe INDEX FREE``: the card, and the bytes
that were free on it before. Values do not matter here, only shapes: weights and latents are zeros.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lowvram.denoise.rollout import Rollout, RolloutSettings
from lowvram.loading.fused_block import fuse
from lowvram.offload.copy_engine import engine_for
from lowvram.offload.placement import Placement
from lowvram.planning.library_memory import measure_parts
from lowvram.planning.workload import Workload
from lowvram.schedule import FRAMES_PER_BLOCK, blocks_of
from lowvram.simulate.device import SimulatedDevice
from lowvram_kernels.chips import has_fp8_units
from lowvram_kernels.modules import Attention, swap_linear
from lowvram_models.attention import CrossAttention
from lowvram_models.config import DiTConfig
from lowvram_models.constants import (
    FRAMES_PER_LATENT,
    LATENT_CHANNELS,
    MOTION_LATENTS,
    PIXELS_PER_LATENT,
    PRIMING_LATENTS,
)
from lowvram_models.dit import CausalDiT
from lowvram_models.vae import StreamingVAE, build_vae

Tensor = torch.Tensor

# The published model with one layer (model-spec section 1): kernels are compiled for widths, not for depths.
ONE_LAYER = DiTConfig(
    dim=5120, ffn_dim=13824, num_heads=40, num_layers=1, freq_dim=256, text_len=512, audio_dim=1024,
    audio_inject_layers=(0,),
)  # fmt: skip
VAE_BASE_DIM = 96
_LATENTS_PER_CLIP = 6
_MATRIX = 1024


class CudaRunner:
    """This process. ``free_before`` are the bytes that were free before it had a context."""

    def __init__(self, device: torch.device, free_before: int):
        self._device, self._free_before = device, free_before

    def outside(self) -> int:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self._device)
        return max(0, self._free_before - free - torch.cuda.memory_reserved(self._device))

    def run(self, part: str) -> int:
        before = torch.cuda.memory_allocated(self._device)
        if part == "cublas":
            products(self._device)
            return torch.cuda.memory_allocated(self._device) - before  # workspaces, which stay
        if part == "modules":
            for dtype in (torch.int8, torch.float8_e4m3fn) if has_fp8_units(self._device) else (torch.int8,):
                for kv in ("int8", "plain"):
                    layers(ONE_LAYER, self._device, dtype=dtype, kv=kv, latent_size=(48, 88))
            return 0
        return self._vae(Workload.of_size(part).latent_size)

    def _vae(self, latent_size: tuple[int, int]) -> int:
        """What convolutions take beside their tensors: the peak, less that of the same tensors alone."""
        taken = []
        for work in (decode, encode):
            torch.cuda.reset_peak_memory_stats(self._device)
            before = torch.cuda.memory_allocated(self._device)
            work(VAE_BASE_DIM, self._device, latent_size)
            taken.append(torch.cuda.max_memory_allocated(self._device) - before - tensors_alone(work, latent_size))
        return max(0, *taken)


def tensors_alone(work: Callable[[int, torch.device, tuple[int, int]], None], latent_size: tuple[int, int]) -> int:
    """The peak of ``work`` on a simulated device, whose kernels take nothing."""
    with SimulatedDevice(cublas_workspace_bytes=0, expandable_segments=True) as simulated:
        work(VAE_BASE_DIM, torch.device("meta"), latent_size)
        return simulated.peak_allocated


def products(device: torch.device) -> None:
    """A matrix product of each kind that runs call."""
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.zeros(_MATRIX, _MATRIX, dtype=dtype, device=device)
        a @ a.t()
        torch.addmm(a[0], a, a.t())
    eight = torch.zeros(_MATRIX, _MATRIX, dtype=torch.int8, device=device)
    torch._int_mm(eight, eight.t())


@torch.inference_mode()
def layers(
    config: DiTConfig, device: torch.device, *, dtype: torch.dtype, kv: str, latent_size: tuple[int, int]
) -> None:
    """Sink and two clips of two blocks through a DiT with 8-bit Linears: every kernel of a run at its shapes."""
    values = torch.bfloat16 if device.type == "cuda" else torch.float32
    settings = RolloutSettings(frames_per_clip=_LATENTS_PER_CLIP, latent_size=latent_size, sample_steps=1)
    rollout = Rollout(
        _dit(config, device, dtype, values),
        _Resident(config.num_layers),  # type: ignore[arg-type]
        torch.zeros(config.text_len, config.text_dim, device=device),
        settings,
        dtype=values,
        engine=engine_for(device),
        placement=Placement(kv=kv),
    )

    def latents(frames: int) -> Tensor:
        return torch.zeros(LATENT_CHANNELS, frames, *latent_size, device=device)

    rollout.prefill(latents(1), latents(MOTION_LATENTS))
    for block in blocks_of(2, _LATENTS_PER_CLIP):
        audio = torch.zeros(1, config.audio_layers, config.audio_dim, FRAMES_PER_LATENT * block.frames, device=device)
        rollout.denoise(block, latents(block.frames), audio)


class _Resident:
    """Layers that are where they are."""

    def __init__(self, count: int):
        self.count = count

    def place(self, streamed: object, slots: int) -> None:
        """All stay."""

    def resident(self, index: int) -> bool:
        return True

    def enter(self, index: int) -> None:
        """It is here."""

    def leave(self, index: int) -> None:
        """It stays."""


def _dit(config: DiTConfig, device: torch.device, weights: torch.dtype, values: torch.dtype) -> CausalDiT:
    with torch.device("meta"):
        dit = CausalDiT(config)
    for name, module in list(dit.named_modules()):
        if isinstance(module, CrossAttention):
            module.attention = Attention()
        if isinstance(module, nn.Linear) and name.startswith(("blocks.", "audio_injector.")):
            swap_linear(dit, name, weights)
    fuse(dit)
    _fill(dit, device, values)
    return dit.eval().requires_grad_(False)


def _fill(model: nn.Module, device: torch.device, values: torch.dtype) -> None:
    """Zeros for every parameter, 8-bit weights and their scales as they are."""
    for name, absent in list(model.named_parameters()):
        path, _, leaf = name.rpartition(".")
        kept = absent.dtype in (torch.int8, torch.float8_e4m3fn) or leaf == "weight_scale"
        zeros = torch.zeros(absent.shape, dtype=absent.dtype if kept else values, device=device)
        model.get_submodule(path)._parameters[leaf] = nn.Parameter(zeros, requires_grad=False)


def decode(base_dim: int, device: torch.device, latent_size: tuple[int, int]) -> None:
    """A block of latents through the VAE's decoder, behind those that prime it."""
    decoder = _vae(base_dim, device).start_decoder()
    decoder.prime(torch.zeros(LATENT_CHANNELS, PRIMING_LATENTS, *latent_size, device=device))
    decoder.decode(torch.zeros(LATENT_CHANNELS, FRAMES_PER_BLOCK, *latent_size, device=device))


def encode(base_dim: int, device: torch.device, latent_size: tuple[int, int]) -> None:
    """A picture through the VAE's encoder, as often as it takes to see every convolution at work."""
    height, width = (PIXELS_PER_LATENT * side for side in latent_size)
    _vae(base_dim, device).encode_repeated(torch.zeros(3, height, width, device=device), 13)


def _vae(base_dim: int, device: torch.device) -> StreamingVAE:
    with torch.device("meta"):
        model = build_vae(base_dim)
    values = torch.float32 if device.type == "cpu" else torch.bfloat16
    _fill(model, device, values)
    return StreamingVAE(model.eval().requires_grad_(False), dtype=values)


def main(arguments: list[str]) -> dict[str, Any]:
    device, free = torch.device("cuda", int(arguments[0])), int(arguments[1])
    with torch.cuda.device(device):
        return dataclasses.asdict(measure_parts(CudaRunner(device, free)))


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
