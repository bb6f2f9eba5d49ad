"""What ``lowvram plan`` does: options to a plan."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import psutil
import torch

from lowvram.byte_sizes import parse_bytes
from lowvram.planning.cards import Card, card_named
from lowvram.planning.costs import GIB
from lowvram.planning.measure import card_at_hand
from lowvram.planning.planner import Plan, plan
from lowvram.planning.workload import Workload
from lowvram_kernels.errors import ConfigError
from lowvram_quantize.format import Artifact

# For a card that is not here, whose host is not here either.
DEFAULT_CARD, DEFAULT_RAM_BYTES = "rtx4090", 64 * GIB


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """As they come from the command line. ``vram`` and ``ram`` are texts as "22.15GiB", None for what the card, and
    the host, have; ``gpu`` is a name of the table or "auto"."""

    vram: str | None = None
    ram: str | None = None
    size: str = "704*384"
    infer_frames: int = 48
    sample_steps: int = 4
    gpu: str = "auto"
    kv: str = "auto"
    wave: str = "auto"
    offload_model: bool = False
    offload_kv_cache: bool = False


def plan_for(model: Path, options: PlanOptions) -> Plan:
    """Plan a run of the artifact in ``model``.

    Raises:
        CheckpointError: no artifact.
        ConfigError, InputError: an option that cannot be used.
        DoesNotFit: nothing fits.
    """
    at_hand = options.gpu == "auto" and torch.cuda.is_available()
    card = _card(options.gpu)
    result = plan(
        Artifact.open(model),
        Workload.of_size(options.size, infer_frames=options.infer_frames, sample_steps=options.sample_steps),
        vram_bytes=parse_bytes(options.vram) if options.vram else card.usable_bytes,
        ram_bytes=_ram_bytes(options.ram, at_hand),
        card=card,
        kv=options.kv,
        wave=_wave(options.wave),
        offload_model=options.offload_model,
        offload_kv=options.offload_kv_cache,
    )
    if options.gpu == "auto" and not at_hand:
        said = f"no CUDA device is here: speeds are those of {card.name}; another is named with --gpu"
        result = dataclasses.replace(result, notes=(said, *result.notes))
    return result


def _card(name: str) -> Card:
    if name != "auto":
        return card_named(name)
    return card_at_hand(torch.device("cuda")) if torch.cuda.is_available() else card_named(DEFAULT_CARD)


def _ram_bytes(text: str | None, at_hand: bool) -> int:
    if text:
        return parse_bytes(text)
    return int(psutil.virtual_memory().total) if at_hand else DEFAULT_RAM_BYTES


def _wave(text: str) -> str | int:
    if text == "auto":
        return text
    if not text.isdecimal():
        raise ConfigError(f"--wave is {text!r}; expected auto, or 1 to the number of steps")
    return int(text)
