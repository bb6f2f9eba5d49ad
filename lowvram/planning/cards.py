"""Graphics cards by name: memory and rates, from public data sheets."""

from __future__ import annotations

import dataclasses

import torch

from lowvram.planning.costs import GIB, MIB
from lowvram.planning.outside import OutsideAllocator
from lowvram_kernels.errors import ConfigError

TERA, GIGA = 1e12, 1e9

# Share of a peak rate that a whole layer reaches, until it is measured: Linears with the passes over their inputs and
# outputs (quantizing, norms, residuals), fused attention, and the VAE's convolutions, which wait for memory.
# A rate that was measured on the card is that of a large product already, and less is lost from it.
DATA_SHEET_EFFICIENCY = {"linear": 0.6, "attention": 0.6, "vae": 0.3}
MEASURED_EFFICIENCY = {"linear": 0.75, "attention": 0.7, "vae": 0.4}

# What a card sends to another while it receives as much. GeForce cards from the RTX 40 on have no way to each other but
# through host memory, where NCCL writes and reads again what a card with 16 lanes of PCIe 4.0 could carry at 25 GB/s.
# Not measured: a judgement, and said in every plan that depends on it. Cards with NVLink do far better.
LINK_BYTES_PER_S = 10 * GIGA


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """Dense operations a second and bytes a second. ``fp8`` None: no FP8 units, fp8 weights are widened to what is
    computed in. ``fp32`` is IEEE's, without TF32."""

    int8: float
    fp8: float | None
    bf16: float
    fp32: float
    h2d: float
    d2h: float
    measured: bool = False

    @property
    def efficiency(self) -> dict[str, float]:
        return MEASURED_EFFICIENCY if self.measured else DATA_SHEET_EFFICIENCY

    def of(self, precision: str, dtype: torch.dtype) -> float:
        """Peak operations a second of Linears of an artifact's precision, where the others compute in ``dtype``."""
        by_precision = {"int8": self.int8, "fp8": self.fp8 or self.values(dtype)}
        return by_precision.get(precision, self.values(dtype))

    def values(self, dtype: torch.dtype) -> float:
        """Peak operations a second of what is not 8-bit."""
        return self.fp32 if dtype is torch.float32 else self.bf16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """``usable_bytes`` is what a process of ours can allocate: without the CUDA context, and on cards that draw a
    desktop without that. ``outside`` is what was measured beside tensors, None where nothing was."""

    name: str
    vram_bytes: int
    usable_bytes: int
    rates: Rates
    outside: OutsideAllocator | None = None

    @property
    def has_fp8(self) -> bool:
        return self.rates.fp8 is not None


def _card(
    name: str,
    vram_mib: int,
    usable_gib: float,
    *,
    int8: float,
    fp8: float | None,
    bf16: float,
    fp32: float,
    pcie: float,
) -> Card:
    """Rates in tera operations a second, ``pcie`` in GB/s each way."""
    rates = Rates(
        int8=int8 * TERA,
        fp8=fp8 and fp8 * TERA,
        bf16=bf16 * TERA,
        fp32=fp32 * TERA,
        h2d=pcie * GIGA,
        d2h=pcie * GIGA,
    )
    return Card(name=name, vram_bytes=vram_mib * MIB, usable_bytes=int(usable_gib * GIB), rates=rates)


# Memory as the driver reports it. Rates are NVIDIA's data sheets' dense tensor-core figures (Ampere GA102, Ada and
# Blackwell architecture papers; A100, L40S, H100 SXM and H200 data sheets), bf16 and fp8 with float32 accumulation,
# which is half of the fp16-accumulating figure on GeForce; fp32 is that of the cores without tensor cores. PCIe is what
# pinned copies of tens of MiB reach on a board with 16 lanes: 25 of 32 GB/s on PCIe 4.0, 50 of 64 on 5.0.
CARDS = {
    card.name: card
    for card in (
        _card("rtx3060", 12288, 11.0, int8=102, fp8=None, bf16=25.6, fp32=12.7, pcie=25),
        _card("rtx3090", 24576, 22.15, int8=284, fp8=None, bf16=71, fp32=35.6, pcie=25),
        _card("rtx4080", 16376, 14.5, int8=390, fp8=195, bf16=97.5, fp32=48.7, pcie=25),
        _card("rtx4090", 24564, 22.15, int8=660, fp8=330, bf16=165, fp32=82.6, pcie=25),
        _card("rtx5090", 32607, 30.0, int8=838, fp8=419, bf16=209.5, fp32=104.8, pcie=50),
        _card("a6000", 49140, 46.5, int8=310, fp8=None, bf16=155, fp32=38.7, pcie=25),
        _card("l40s", 46068, 43.5, int8=733, fp8=733, bf16=362, fp32=91.6, pcie=25),
        _card("a100-40gb", 40960, 38.5, int8=624, fp8=None, bf16=312, fp32=19.5, pcie=25),
        _card("a100-80gb", 81920, 78.0, int8=624, fp8=None, bf16=312, fp32=19.5, pcie=25),
        _card("h100", 81559, 78.0, int8=1979, fp8=1979, bf16=989, fp32=66.9, pcie=50),
        _card("h200", 143771, 138.0, int8=1979, fp8=1979, bf16=989, fp32=66.9, pcie=50),
    )
}


def card_named(name: str) -> Card:
    """Raises: ConfigError for a card that is not in the table."""
    if name not in CARDS:
        raise ConfigError(f"--gpu is {name!r}; expected auto (the card at hand) or one of {', '.join(CARDS)}")
    return CARDS[name]
