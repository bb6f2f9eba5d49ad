"""What the VAE's benchmarks simulate and count: int8 convolutions, and decoding beside denoising."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from lowvram.planning import Workload
from lowvram.planning.memory_costs import decode_operations
from lowvram.planning.timing import Seconds
from lowvram_models.vae import StreamingVAE, build_vae

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(BENCHMARKS)])
    import vae_counts
    import vae_int8
    import vae_overlap

    return {"counts": vae_counts, "int8": vae_int8, "overlap": vae_overlap}


def test_products_are_those_that_plans_know(benchmarks):
    counts = benchmarks["counts"].decoder_counts(128, 192)
    work = Workload(latent_size=(16, 24), dtype=torch.bfloat16)
    assert counts.products * work.frames_per_block == pytest.approx(decode_operations(96, work), rel=0.01)
    assert 0.99 < counts.wide / counts.products < 1
    assert counts.pass_bytes == sum(counts.by_name.values())


@pytest.mark.parametrize("variant", ["weights", "tensor", "frame", "smoothed", "rotated", "pixel"])
def test_what_is_rounded_lies_on_a_grid_of_255_levels(benchmarks, variant):
    _, rounding = benchmarks["int8"].VARIANTS[variant]
    x, weight = torch.randn(1, 16, 2, 5, 6), torch.randn(8, 16, 3, 3, 3)
    x[:, 3] *= 20
    found_x, found_weight = rounding(x, weight)
    assert 0 < (found_weight - weight).norm() / weight.norm() < 0.03
    assert (variant == "weights") == torch.equal(found_x, x)
    if variant != "weights":
        assert 0 < (found_x - x).norm() / x.norm() < 0.03
    if variant == "tensor":
        assert len(found_x.unique()) <= 255
    if variant == "pixel":
        assert len(found_x[0, :, 0, 0, 0].div(x[0, :, 0, 0, 0].abs().max() / 127).round().unique()) <= 16


def test_convolutions_are_rounded_inside_alone(benchmarks):
    torch.manual_seed(0)
    vae, int8 = StreamingVAE(build_vae(8)), benchmarks["int8"]
    latent = torch.randn(16, 2, 2, 3)
    exact = vae.start_decoder().decode(latent)
    off = {}
    for full in (False, True):
        with int8.rounding_in(vae, int8.one_scale, full=full):
            off[full] = float((vae.start_decoder().decode(latent) - exact).norm() / exact.norm())
    assert 0 < off[False] != off[True] > 0
    assert torch.equal(vae.start_decoder().decode(latent), exact)


@pytest.mark.parametrize(
    ("arithmetic", "pcie", "exposed", "decode", "hidden", "expected"),
    [
        (2.0, 0.5, 0.0, 0.5, 0.1, 2.4),  # products add up, passes hide
        (2.0, 0.5, 0.1, 0.5, 0.1, 2.5),
        (1.0, 3.0, 0.0, 0.5, 0.1, 3.0),  # all of the VAE hides behind copies
        (1.0, 1.2, 0.0, 0.5, 0.0, 1.5),
        (1.0, 0.5, 0.0, 0.5, 0.9, 1.0),  # no more passes than there is decoding
    ],
)
def test_what_hides_behind_what(benchmarks, arithmetic, pcie, exposed, decode, hidden, expected):
    seconds = Seconds(arithmetic=arithmetic, pcie=pcie, exposed=exposed, decode=decode)
    together = benchmarks["overlap"].together(seconds, hidden)
    assert together == pytest.approx(expected)
    assert together <= seconds.block
