"""What 8 bits cost attention over rings, by how far the logits spread: the arithmetic of the Triton kernel, emulated.

Keys, queries and values are those of ``benchmarks/attention_variants.py``, at its full number of keys.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
HEADS = 16
# Relative errors that were expected of such a kernel, by the logits' standard deviation in nats, and what is let pass.
EXPECTED, ALLOWED = {0.7: 0.0010, 2.0: 0.0047, 4.0: 0.0104, 7.0: 0.0167}, 1.2


@pytest.fixture
def variants(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(BENCHMARKS)])
    import attention_variants

    return attention_variants


@pytest.mark.parametrize("spread", EXPECTED)
def test_errors_of_a_full_ring_by_spread_of_the_logits(variants, spread):
    found = []
    for seed in range(HEADS):
        head = variants.head(spread, variants.SPREADS[spread], seed)
        assert sum(head.blocks) == 15312
        exact = head.exact()
        found.append(((variants.ours(head, variants.encoded(head)) - exact).norm() / exact.norm()).item())
    assert EXPECTED[spread] / 2 < sum(found) / HEADS < ALLOWED * EXPECTED[spread], found


def test_the_table_has_every_variant_and_what_the_instructions_make_of_it(variants, monkeypatch):
    monkeypatch.setattr(variants, "_positions", lambda places=variants._positions: [p[:150] for p in places()])
    monkeypatch.setattr(variants, "_ropes", lambda ropes=variants._ropes: [_first(rope, 150) for rope in ropes()])
    rows = variants.errors({2.0: 1.0, 4.0: 0.7}, 1)
    assert rows[0]["variant"] == variants.OURS
    assert len({row["variant"] for row in rows}) == len(rows) >= 7
    assert all(0 < row[name] < 0.5 for row in rows for name in ("2 nats", "4 nats"))


def _first(rope, tokens):
    return type(rope)(rope.cos[:tokens], rope.sin[:tokens])
