"""Checks of the GPUs: which kernels serve each, what is free on it, and how fast copies to it are."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lowvram.byte_sizes import gib
from lowvram.doctor.findings import Finding, ok, problem, warning
from lowvram.doctor.probes import CardState, Gpu, Probes, Torch
from lowvram.doctor.wants import RankWants, Wants
from lowvram.planning.cards import GIGA
from lowvram_kernels.chips import GENERATIONS

# What a CUDA context and a small desktop take; beyond it, somebody else computes on the card.
TAKEN_BYTES = 2 * 2**30

# GB/s of a lane each way by PCIe generation (PCI-SIG: raw rate less line coding), and the share of it that pinned
# copies of tens of MiB reach: 25 of 31.5 GB/s with 16 lanes of PCIe 4.0.
LANE_RATES = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}
REACHED = 0.79
# A copy below this share of what its link should reach does not just vary.
SLOW = 0.6


def check_count(gpus: Sequence[Gpu], ranks: int) -> Finding:
    if not gpus:
        return warning(
            "gpus",
            "no CUDA device: everything runs on the processor",
            advice="to use a GPU, see what was said of torch and driver",
            why="that is fine for the tiny model, but the 14B takes minutes a block there",
        )
    if ranks > len(gpus):
        return problem(
            "gpus",
            f"{len(gpus)} here",
            expected=f"{ranks}, one a rank",
            advice=f"give --gpus {len(gpus)}, or look at CUDA_VISIBLE_DEVICES",
            why="ranks do not share a card",
        )
    return ok("gpus", f"{len(gpus)} here, {ranks} used")


def check_generation(gpu: Gpu, torch: Torch) -> Finding:
    check = f"gpu {gpu.index}"
    found = f"{gpu.name}, sm_{gpu.generation}"
    if torch.architectures and not serves(torch.architectures, gpu.generation):
        return problem(
            check,
            found,
            expected=f"one of {', '.join(torch.architectures)}, which this PyTorch has code for",
            advice="install a PyTorch for a CUDA version that knows the card",
            why="every kernel would fail with 'no kernel image is available'",
        )
    if gpu.generation < GENERATIONS[0]:
        return warning(
            check,
            found,
            expected="sm_80 (RTX 30, A100) or newer",
            advice="expect PyTorch's own kernels",
            why="the fused ones need what came with sm_80, and bf16 is emulated before",
        )
    paths = "int8 and fp8 on its units" if gpu.fp8 else "int8 on its units; no fp8 units, fp8 is widened to bf16 at use"
    kernels = "Triton kernels" if gpu.triton else "PyTorch's own kernels"
    near = "" if gpu.generation in GENERATIONS else ", with the settings of an RTX 30"
    return ok(check, f"{found}: {paths}; {kernels}{near}")


def serves(architectures: Sequence[str], generation: int) -> bool:
    """Whether code for "sm_AB" (the same major version and no newer) or "compute_AB" (any older) is there."""
    for name in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)", name)
        if match is None or int(match[2]) > generation:
            continue
        if match[1] == "compute" or int(match[2]) // 10 == generation // 10:
            return True
    return False


def check_vram(gpu: Gpu, state: CardState | None, wants: Wants | None) -> Finding:
    """Rank i runs on GPU i."""
    check = f"vram {gpu.index}"
    held = gpu.total_bytes - gpu.free_bytes
    found = f"{gib(gpu.free_bytes)} of {gib(gpu.total_bytes)} free" + _beside(state)
    wanted = wants.ranks[gpu.index] if wants else None
    if wants is not None and wanted is not None and wanted.vram_bytes > gpu.free_bytes:
        return problem(
            check,
            found,
            expected=f"{gib(wanted.vram_bytes)} at the least for {wants.what} {_where(wanted)}",
            advice="free the card, or take a smaller --size (lowvram plan shows what fits)",
            why="a run that does not fit is refused at the start",
        )
    if held > TAKEN_BYTES:
        who = "; ".join(state.processes) if state and state.processes else "nvidia-smi shows by whom"
        return warning(
            check,
            found,
            expected=f"at most {gib(TAKEN_BYTES)} taken",
            advice=f"end what else uses the card ({who})",
            why="what others hold is streamed from the host instead, and a run may meet them growing",
        )
    return ok(check, found)


def _where(wanted: RankWants) -> str:
    return f"on {wanted.name}" if wanted.name else "on one card"


def _beside(state: CardState | None) -> str:
    if state is None:
        return ""
    said = []
    if state.display:
        said.append("it draws a desktop")
    if state.ecc:
        said.append("ECC is on, which takes some memory and speed of cards with GDDR")
    return "".join(f", {text}" for text in said)


def check_pcie(gpu: Gpu, state: CardState | None, wants: Wants | None, probes: Probes) -> Finding:
    check = f"pcie {gpu.index}"
    inwards, outwards = probes.pcie(gpu.index)
    found = f"{inwards / GIGA:.1f} GB/s in, {outwards / GIGA:.1f} GB/s out"
    expected = _link_rate(state)
    if expected is not None and state is not None:
        found += f", over PCIe {state.link_gen}.0 x{state.link_lanes}"
    if expected is not None and min(inwards, outwards) < SLOW * expected:
        return warning(
            check,
            found,
            expected=f"{expected / GIGA:.0f} GB/s each way of that link",
            advice="seat the card and its riser anew, look for another card on the same lanes",
            why="weights and KV rings cross it in every block",
        )
    if wants is not None and (slow := _too_slow(wants, wants.ranks[gpu.index], inwards, outwards)):
        return warning(
            check,
            found,
            expected="copies that end before the computation beside them",
            advice="put the card into the slot with the most lanes, straight to the processor",
            why=slow,
        )
    return ok(check, found)


def _link_rate(state: CardState | None) -> float | None:
    """Bytes a second that pinned copies should reach."""
    if state is None or state.link_gen not in LANE_RATES or not state.link_lanes:
        return None
    return LANE_RATES[state.link_gen] * GIGA * state.link_lanes * REACHED


def _too_slow(wants: Wants, wanted: RankWants, inwards: float, outwards: float) -> str:
    seconds = max(wanted.bytes_in / inwards, wanted.bytes_out / outwards)
    if seconds <= wanted.busy_s:
        return ""
    return f"{wants.what} copies {seconds:.1f} s a block {_where(wanted)} and computes {wanted.busy_s:.1f} s"
