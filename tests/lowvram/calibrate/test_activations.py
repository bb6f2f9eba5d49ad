"""Statistics of activations against those of all values at once; which rows are kept."""

from __future__ import annotations

import math

import pytest
import torch

from lowvram.calibrate.activations import Sampler, Watched
from lowvram_kernels.errors import CheckpointError

K = 24


def seen(*inputs: torch.Tensor, limit: int = 64) -> Watched:
    watched, sampler = Watched(), Sampler(limit)
    for x in inputs:
        watched.add(*sampler(x))
    return watched


def drawn(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, K, generator=torch.Generator().manual_seed(seed))


def outlier(x: torch.Tensor) -> torch.Tensor:
    x[:, 3] *= 50
    return x


def dead(x: torch.Tensor) -> torch.Tensor:
    x[:, :6] = 0
    return x


CASES = {
    "normal": [drawn(70), drawn(30, 1)],
    "an outlier": [outlier(drawn(50)), outlier(drawn(10, 2))],
    "dead channels": [dead(drawn(50))],
    "far from zero": [drawn(40) + 7],
    "one row": [drawn(1)],
    "large": [drawn(40) * 1e12],
    "bfloat16": [drawn(40).bfloat16()],
    "three dimensions": [drawn(40).view(4, 10, K)],
}


@pytest.mark.parametrize("name", CASES)
def test_statistics_are_those_of_all_values(name):
    inputs = CASES[name]
    found = seen(*inputs).statistics("x")
    x = torch.cat([each.reshape(-1, K) for each in inputs]).double()
    channels, off = x.abs().amax(0), x - x.mean()
    assert found.tokens == len(x)
    assert found.amax == pytest.approx(float(x.abs().max()))
    assert found.rms == pytest.approx(float(x.square().mean().sqrt()))
    assert found.channel_ratio == pytest.approx(float(channels.max() / channels.median()))
    assert found.kurtosis == pytest.approx(float(off.pow(4).mean() / off.square().mean() ** 2), rel=1e-6)
    assert found.dead == pytest.approx(6 / K if name == "dead channels" else 0.0)


@pytest.mark.parametrize(
    ("x", "ratio", "said"),
    [(torch.zeros(3, K), 1.0, 1.0), (torch.eye(K)[:2], math.inf, (K - 2) / K), (torch.ones(3, K), 1.0, 0.0)],
)
def test_zeros_and_constants(x, ratio, said):
    found = seen(x).statistics("x")
    assert (found.channel_ratio, found.dead) == (ratio, said)
    assert all(value is None or math.isfinite(value) for value in found.to_json().values())


def test_repeated_rows_count_once():
    """Prompts are padded to 512 rows, which would hide what is said."""
    x = torch.cat([drawn(9), torch.ones(500, K)])
    watched = seen(x)
    assert watched.statistics("x").tokens == 10
    assert torch.equal(watched.rows(), torch.cat([drawn(9), torch.ones(1, K)]))


def test_one_input_of_several_linears_is_kept_once():
    x, sampler = drawn(20), Sampler()
    assert sampler(x)[1] is sampler(x)[1]
    assert sampler(x.clone())[1] is not sampler(x)[1]


def test_the_same_input_again_is_passed_over():
    x, sampler, watched = drawn(20), Sampler(), Watched()
    for _ in range(4):
        watched.add(*sampler(x))
    assert watched.statistics("x").tokens == len(watched.rows()) == 20


@pytest.mark.parametrize(("rows", "limit", "kept"), [(100, 10, 10), (10, 10, 10), (3, 10, 3), (1, 1, 1), (1000, 7, 7)])
def test_rows_are_kept_up_to_a_limit(rows, limit, kept):
    x = drawn(rows)
    found = seen(x, limit=limit).rows()
    assert len(found) == kept
    assert torch.equal(found[0], x[0])
    assert kept == 1 or torch.equal(found[-1], x[-1])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number(value):
    x = drawn(5)
    x[2, 2] = value
    with pytest.raises(CheckpointError, match=r"inputs of blocks\.0\.ffn\.0 hold NaN or infinity"):
        seen(x).statistics("blocks.0.ffn.0")


def test_a_linear_that_was_never_computed():
    with pytest.raises(CheckpointError, match="never computed"):
        Watched().statistics("x")
