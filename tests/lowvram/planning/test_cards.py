"""Limits that were worked out by hand from data sheets."""

from __future__ import annotations

import pytest

from lowvram.planning import CARDS, Workload
from lowvram.planning.timing import limits

# Card; seconds of a block at 704*384 in int8 and bf16; all int8 weights and rings over PCIe once.
BY_HAND = [
    ("rtx4090", 0.75, 2.98, 1.48),
    ("rtx3090", 1.73, 6.9, 1.48),
    ("rtx5090", 0.59, 2.3, 0.74),
    ("a100-80gb", 0.79, 1.6, 1.48),
    ("h100", 0.25, 0.50, 0.74),
    ("h200", 0.25, 0.50, 0.74),
]


@pytest.mark.parametrize(("name", "int8", "bf16", "pcie"), BY_HAND)
def test_limits_agree_with_those_made_by_hand(sizes, name, int8, bf16, pcie):
    found = limits(sizes("int8"), Workload.of_size("704*384"), CARDS[name].rates)
    # Within 1 %, or half a step of the last digit that was printed.
    for value, printed in ((found.int8_arithmetic_s, int8), (found.bf16_arithmetic_s, bf16), (found.pcie_once_s, pcie)):
        step = 0.01 if printed not in (6.9, 2.3, 1.6) else 0.1
        assert abs(value - printed) <= max(0.01 * printed, step / 2)


def test_cards_are_plausible():
    for card in CARDS.values():
        assert 0.88 * card.vram_bytes < card.usable_bytes < card.vram_bytes
        assert card.rates.int8 >= card.rates.bf16
        assert card.has_fp8 == (card.generation >= 89)
        assert 3e9 < card.rates.h2d == card.rates.d2h < 60e9 < card.rates.memory
    assert not CARDS["rtx3090"].has_fp8
    assert CARDS["rtx4090"].has_fp8


# Tera operations a second as data sheets print them, with sparsity, which doubles them: "AI TOPS" of int8 on GeForce
# RTX 40 and of fp4, four times int8, on RTX 50; fp8 on RTX Ada; bf16 on RTX A.
PRINTED = [
    ("rtx4090", "int8", 1321, 2),
    ("rtx4080super", "int8", 836, 2),
    ("rtx4070tisuper", "int8", 706, 2),
    ("rtx4070super", "int8", 568, 2),
    ("rtx4070", "int8", 466, 2),
    ("rtx4060ti-16gb", "int8", 353, 2),
    ("rtx4060", "int8", 242, 2),
    ("rtx5090", "int8", 3352, 4),
    ("rtx5080", "int8", 1801, 4),
    ("rtx5070ti", "int8", 1406, 4),
    ("rtx5070", "int8", 988, 4),
    ("rtx5060ti-16gb", "int8", 759, 4),
    ("rtx5060", "int8", 614, 4),
    ("rtx5090-laptop", "int8", 1824, 4),
    ("rtx5080-laptop", "int8", 1334, 4),
    ("rtx5070ti-laptop", "int8", 992, 4),
    ("rtx5070-laptop", "int8", 798, 4),
    ("rtx6000-ada", "fp8", 1457, 2),
    ("rtx5000-ada", "fp8", 1044.4, 2),
    ("rtx4500-ada", "fp8", 634, 2),
    ("rtx4000-sff-ada", "fp8", 306.8, 2),
    ("rtx2000-ada", "fp8", 191.9, 2),
    ("a6000", "bf16", 309.7, 2),
    ("a5000", "bf16", 222.2, 2),
    ("a4500", "bf16", 189.2, 2),
    ("a4000", "bf16", 153.4, 2),
    ("l4", "int8", 485, 2),
    ("l40s", "fp8", 1466, 2),
    ("a10", "int8", 500, 2),
    ("a30", "bf16", 330, 2),
    ("h100-pcie", "bf16", 1513, 2),
    ("h100-nvl", "fp8", 3341, 2),
]


@pytest.mark.parametrize(("name", "kind", "printed", "times"), PRINTED)
def test_rates_are_those_that_data_sheets_print(name, kind, printed, times):
    assert getattr(CARDS[name].rates, kind) * times / 1e12 == pytest.approx(printed, rel=0.01)


# Multiprocessors and the clock of data sheets, GHz.
CLOCKS = [
    ("rtx4090", 128, 2.52),
    ("rtx3090", 82, 1.695),
    ("rtx5090", 170, 2.407),
    ("a100-80gb", 108, 1.41),
    ("h100", 132, 1.98),
]


@pytest.mark.parametrize(("name", "multiprocessors", "ghz"), CLOCKS)
def test_units_are_those_of_the_architecture(name, multiprocessors, ghz):
    """16 exponentials and 128 threads' instructions a clock and multiprocessor, on each of them."""
    rates = CARDS[name].rates
    assert rates.exp2 == pytest.approx(16 * multiprocessors * ghz * 1e9, rel=0.01)
    assert rates.instructions == pytest.approx(128 * multiprocessors * ghz * 1e9, rel=0.01)
