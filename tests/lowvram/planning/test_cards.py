"""Limits that were worked out by hand from data sheets."""

from __future__ import annotations

import pytest

from lowvram.planning import CARDS, Workload
from lowvram.planning.cards import card_named
from lowvram.planning.timing import limits
from lowvram_kernels.errors import ConfigError

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
def test_limits_agree_with_those_made_by_hand(facts, name, int8, bf16, pcie):
    found = limits(facts("int8"), Workload.of_size("704*384"), CARDS[name].rates)
    # Within 1 %, or half a step of the last digit that was printed.
    for value, printed in ((found.int8_arithmetic_s, int8), (found.bf16_arithmetic_s, bf16), (found.pcie_once_s, pcie)):
        step = 0.01 if printed not in (6.9, 2.3, 1.6) else 0.1
        assert abs(value - printed) <= max(0.01 * printed, step / 2)


def test_cards_are_plausible():
    for card in CARDS.values():
        assert 0.88 * card.vram_bytes < card.usable_bytes < card.vram_bytes
        assert card.rates.int8 > card.rates.bf16
        assert card.has_fp8 == (card.rates.fp8 is not None)
    assert not CARDS["rtx3090"].has_fp8
    assert CARDS["rtx4090"].has_fp8


def test_an_unknown_card_is_refused():
    with pytest.raises(ConfigError, match=r"--gpu is 'voodoo2'.*rtx4090"):
        card_named("voodoo2")
