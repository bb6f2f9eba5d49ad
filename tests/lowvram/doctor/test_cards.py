from __future__ import annotations

import dataclasses

import pytest

from lowvram.doctor.cards import check_count, check_generation, check_pcie, check_vram, serves
from lowvram.doctor.probes import CardState
from tests.lowvram.doctor.invented import ALONE, CUDA_TORCH, GIB, WANTS, gpu, h200, machine, rtx3090

BUILT_FOR = ("sm_80", "sm_86", "sm_90", "sm_90a", "sm_120")


@pytest.mark.parametrize(
    ("generation", "architectures", "served"),
    [
        (86, BUILT_FOR, True),
        (89, BUILT_FOR, True),  # code for sm_86 runs on sm_89
        (75, BUILT_FOR, False),
        (100, BUILT_FOR, False),
        (120, BUILT_FOR[:-1], False),
        (120, ("sm_90", "compute_90"), True),  # compiled when it is loaded
        (90, ("sm_90a",), False),
    ],
)
def test_architectures(generation, architectures, served):
    assert serves(architectures, generation) is served


def test_a_generation_says_which_8_bit_paths_serve_it():
    ada, ampere = check_generation(gpu(), CUDA_TORCH), check_generation(rtx3090(), CUDA_TORCH)
    assert ada.status == ampere.status == "ok"
    assert "int8 and fp8" in ada.found
    assert "no fp8 units" in ampere.found
    assert "PyTorch's own kernels" in check_generation(gpu(triton=False), CUDA_TORCH).found
    assert "RTX 30" in check_generation(gpu(generation=87), CUDA_TORCH).found


def test_cards_that_are_too_old_or_too_new():
    old = gpu(name="NVIDIA GeForce RTX 2080 Ti", generation=75, fp8=False, triton=False)
    assert check_generation(old, CUDA_TORCH).status == "warning"
    new = check_generation(gpu(name="NVIDIA B200", generation=100), CUDA_TORCH)
    assert new.status == "problem"
    assert "no kernel image" in new.why


def test_counting():
    assert check_count([], 1).status == "warning"
    assert check_count([gpu(0)], 2).status == "problem"
    assert check_count([gpu(0), gpu(1)], 2).status == "ok"


def test_memory_that_others_hold():
    card = gpu(free_bytes=21 * GIB)
    found = check_vram(card, CardState(processes=("blender (pid 7) 2900 MiB",)), WANTS)
    assert found.status == "warning"
    assert "blender (pid 7)" in found.advice
    assert "nvidia-smi" in check_vram(card, None, None).advice


def test_what_is_said_of_a_card_besides():
    found = check_vram(gpu(), CardState(display=True, ecc=True), WANTS)
    assert found.status == "ok"
    assert "desktop" in found.found
    assert "ECC" in found.found
    assert "ECC" not in check_vram(gpu(), CardState(display=False, ecc=False), WANTS).found


def test_a_card_without_room():
    found = check_vram(gpu(free_bytes=10 * GIB), None, WANTS)
    assert found.status == "problem"
    assert "20.00 GiB" in found.expected
    assert "on one card" in found.expected


def test_a_card_is_asked_for_what_its_rank_takes():
    small = dataclasses.replace(ALONE, name="rank 1 (VAE)", vram_bytes=7 * GIB, bytes_in=0, bytes_out=10**9, busy_s=0.5)
    wants = dataclasses.replace(WANTS, ranks=(dataclasses.replace(ALONE, name="rank 0 (stage 0, part 0)"), small))
    cards = [gpu(index, free_bytes=10 * GIB, total_bytes=11 * GIB) for index in (0, 1)]
    assert [check_vram(card, None, wants).status for card in cards] == ["problem", "ok"]
    assert "on rank 0 (stage 0, part 0)" in check_vram(cards[0], None, wants).expected
    slow = machine(*cards, pcie=(3e9, 3e9))
    assert [check_pcie(card, None, wants, slow).status for card in cards] == ["warning", "ok"]


@pytest.mark.parametrize(
    ("rates", "state", "status"),
    [
        ((25e9, 25e9), CardState(link_gen=4, link_lanes=16), "ok"),
        ((25e9, 9e9), CardState(link_gen=4, link_lanes=16), "warning"),  # one way is slow
        ((12e9, 12e9), CardState(link_gen=4, link_lanes=8), "ok"),
        ((5.9e9, 5.9e9), CardState(link_gen=4, link_lanes=4), "ok"),  # 2.2 s for 13 GB beside 2.5 s
        ((3e9, 3e9), CardState(link_gen=3, link_lanes=4), "warning"),  # all that the link has, and too little
        ((25e9, 25e9), CardState(), "ok"),
        ((3e9, 3e9), None, "warning"),
    ],
)
def test_pcie(rates, state, status):
    found = check_pcie(gpu(), state, WANTS, machine(gpu(), pcie=rates))
    assert found.status == status
    assert f"{rates[0] / 1e9:.1f} GB/s in" in found.found


def test_pcie_of_a_card_that_holds_everything():
    assert check_pcie(h200(), None, None, machine(h200(), pcie=(1e9, 1e9))).status == "ok"
