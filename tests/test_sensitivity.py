"""The measure of sensitivity: its tables, on invented figures."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lowvram_quantize.sensitivity import SENSITIVITY, role_of

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def sensitivity(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(BENCHMARKS)])
    import sensitivity

    return sensitivity


def row(unit: str, error: float, weight: float) -> dict:
    return {
        "unit": unit,
        "role": role_of(unit),
        "output_error": error,
        "weight_error": weight,
        "sensitivity": (error / weight) ** 2,
    }


ROWS = [
    row("blocks.0.ffn.2", 0.003, 0.01),
    row("blocks.1.ffn.2", 0.004, 0.01),
    row("audio_injector.injector.0.kv", 0.012, 0.01),
]


def test_kinds_have_the_mean_of_their_layers_and_their_share(sensitivity):
    found = sensitivity.by_role(ROWS)
    assert found["ffn.2"] == {"sensitivity": pytest.approx(0.125), "share": pytest.approx(25 / 169)}
    assert found["audio.kv"] == {"sensitivity": pytest.approx(1.44), "share": pytest.approx(144 / 169)}


def test_tables_have_all_cells(sensitivity):
    of = {"bytes": 10, "times_int8": 1.25, "predicted_error": 0.02, "output_error": 0.01}
    units = {"uniform_int8": 0.013, "sum_of_squares": 0.013, "uniform_fp8": 0.04, "rows": ROWS}
    result = {
        "units": units | {"by_role": sensitivity.by_role(ROWS)},
        "budgets": [{"target_bytes": 11, "table": of, "run": of | {"output_error": 0.005}}],
    }
    lines = sensitivity.markdown(result).splitlines()
    assert "| ffn.2 | 0.300% | 0.400% | 14.8% |" in lines
    assert "| audio.kv |  |  | 85.2% |" in lines
    assert lines[-1] == "| 1.25 | 2.00% | 1.00% | 2.00% | 0.50% |"


@pytest.mark.parametrize(
    ("unit", "role"),
    [
        ("blocks.11.self_attn.qkv", "self_attn.qkv"),
        ("blocks.0.cross_attn.kv", "cross_attn.kv"),
        ("blocks.39.ffn.2", "ffn.2"),
        ("audio_injector.injector.11.o", "audio.o"),
        ("audio_injector.injector_adain_layers.3.linear", "audio.adain"),
        ("frame_packer.proj_4x", "frame_packer"),
    ],
)
def test_places_in_the_model(unit, role):
    assert role_of(unit) == role
    assert SENSITIVITY[role] > 0


@pytest.mark.parametrize("unit", ["", "blocks.0.norm3", "head.head", "frame_packer.proj", "xblocks.0.ffn.2"])
def test_what_has_no_place(unit):
    with pytest.raises(ValueError, match="no unit of the DiT"):
        role_of(unit)
