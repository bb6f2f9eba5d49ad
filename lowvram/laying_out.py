"""From options and a workload to a placement: planned for a GPU, plain on a CPU, by hand where that is asked for."""

from __future__ import annotations

import psutil
import torch

from lowvram.placement import MemoryOptions, Placement, placement_on_cpu
from lowvram.planning.measure import card_at_hand
from lowvram.planning.planner import Plan, plan
from lowvram.planning.workload import Workload
from lowvram_quantize.format import Artifact


def lay_out(
    artifact: Artifact, work: Workload, device: torch.device, options: MemoryOptions, layers: int
) -> tuple[Plan | None, Placement]:
    """The placement of a run, and the plan that it comes from where one was made.

    On a GPU, ``options.vram_budget`` caps the process: what goes beyond it fails as on a card of that size.

    Raises:
        OutOfMemoryError: nothing fits; with bytes needed and there.
        ConfigError: an option that does not fit the run.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        # Also where there is no budget: an earlier run of this process may have set one.
        torch.cuda.set_per_process_memory_fraction(min(1.0, (options.vram_budget or total) / total), device)
    if options.placement is not None:
        return None, options.placement
    if device.type == "cpu":
        return None, placement_on_cpu(options, layers, work.sample_steps)
    card = card_at_hand(device)
    found = plan(
        artifact,
        work,
        vram_bytes=min(options.vram_budget or card.usable_bytes, card.usable_bytes),
        ram_bytes=options.ram_budget or psutil.virtual_memory().available,
        card=card,
        kv=options.kv,
        wave=options.wave,
        offload_model=options.offload_model,
        offload_kv=options.offload_kv_cache,
    )
    return found, found.placement
