"""Errors of tokens and layers whose statistics are known by construction."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lowvram.compare.layer_errors import LayerSums
from lowvram.compare.token_errors import Sample, statistics, token_errors
from lowvram.compare.trajectories import SAMPLED_TOKENS, Sampler, sampled_tokens
from lowvram_kernels.errors import InputError


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sample(seed: int, scale: float) -> Sample:
    wanted = normal(4, 3, 8, 12, seed=seed)
    return Sample.of(wanted + scale * normal(4, 3, 8, 12, seed=seed + 100), wanted)


def test_each_token_has_its_own_error():
    """A token is 2 x 2 of the latent, of all channels: frame by frame, row by row."""
    wanted = torch.ones(4, 2, 4, 6)
    mine = wanted.clone()
    mine[:, 1, 2:4, 4:6] = 1.5  # the last token of the second frame
    mine[0, 0, 0, 2] = 5.0  # one value of sixteen of the second token
    errors = token_errors(mine, wanted)
    assert errors.shape == (2 * 2 * 3,)
    assert dict(enumerate(errors.tolist())) == pytest.approx({i: {1: 1.0, 11: 0.5}.get(i, 0.0) for i in range(12)})


@pytest.mark.parametrize(("mine", "wanted", "error"), [(0, 0, 0), (1, 0, math.inf), (0, 1, 1), (2, 1, 1), (-1, 1, 2)])
def test_of_tokens_of_zeros(mine, wanted, error):
    full = torch.full
    assert token_errors(full((2, 1, 2, 2), float(mine)), full((2, 1, 2, 2), float(wanted))).tolist() == [error]


def test_the_figures_are_those_of_all_tokens():
    blocks = [[sample(2 * block + step, 0.01 * (1 + block)) for step in range(2)] for block in range(5)]
    found, every = statistics(blocks), np.concatenate([one.errors for block in blocks for one in block])
    assert found.tokens == len(every) == 5 * 2 * 72
    assert found.mean.value == pytest.approx(every.mean(dtype=np.float64))
    for name, part in (("median", 0.5), ("p99", 0.99), ("p999", 0.999), ("maximum", 1.0)):
        assert getattr(found, name).value == np.quantile(every, part, method="inverted_cdf"), name
    squares = [(float(one.sums.parts[3]), float(one.sums.parts[1])) for block in blocks for one in block]
    wrong, right = (sum(each) for each in zip(*squares, strict=True))
    assert found.relative_error.value == pytest.approx(math.sqrt(wrong / right))
    assert found == statistics(blocks)  # the uncertainty is drawn from a fixed seed


def test_the_uncertainty_is_that_of_blocks():
    """The mean's is the deviation of the blocks' means by the root of their number, however many tokens each has."""
    scales = np.random.default_rng(1).uniform(0.01, 0.05, 40)
    found = statistics([[sample(block, scale)] for block, scale in enumerate(scales)])
    means = [float(sample(block, scale).errors.mean()) for block, scale in enumerate(scales)]
    assert found.mean.uncertainty == pytest.approx(np.std(means, ddof=1) / math.sqrt(40), rel=0.15)
    alike = statistics([[sample(0, 0.02)]] * 40)
    assert [alike.mean.uncertainty, alike.p99.uncertainty, alike.cosine.uncertainty] == pytest.approx([0, 0, 0])


def test_of_one_block_no_uncertainty_is_known():
    found = statistics([[sample(0, 0.01), sample(1, 0.01)]])
    assert found.mean.value > 0
    assert {figure["uncertainty"] for figure in found.to_json().values() if isinstance(figure, dict)} == {None}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("blocks", [1, 2, 3, 8])
@pytest.mark.parametrize("all_of_them", [False, True])
def test_an_infinite_error_has_no_uncertainty(blocks, all_of_them):
    """The baseline gave zeros in one block or in all, the candidate did not."""
    nothing = Sample.of(normal(4, 3, 8, 12, seed=1), torch.zeros(4, 3, 8, 12))
    found = statistics([[nothing if all_of_them or not block else sample(block, 0.01)] for block in range(blocks)])
    infinite = {name: math.isinf(getattr(found, name).value) for name in ("relative_error", "mean", "maximum")}
    assert infinite == {"relative_error": all_of_them or blocks == 1, "mean": True, "maximum": True}
    assert found.mean.uncertainty is None
    assert found.maximum.uncertainty is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nothing_is_said_of_nan(value):
    wanted = normal(4, 1, 2, 2)
    for broken in (0, 1):
        pair = [wanted, wanted.clone()]
        pair[broken] = pair[broken].clone()
        pair[broken][0, 0, 0, 0] = value
        with pytest.raises(ValueError, match="NaN or infinity"):
            Sample.of(*pair)


def test_the_same_tokens_everywhere():
    assert sampled_tokens(5).tolist() == [0, 1, 2, 3, 4]
    many = sampled_tokens(3168)
    assert len(set(many.tolist())) == SAMPLED_TOKENS
    assert torch.equal(many, sampled_tokens(3168))
    x = normal(3168, 3)
    assert torch.equal(Sampler()(x.bfloat16()), x[many].bfloat16().float())


def test_layers_errors_and_what_each_adds():
    """Of a residual stream of norm 10 a layer adds 0.3, another 0.4 across it, a third takes it all back."""
    wanted = torch.zeros(1, 4)
    wanted[0, 3] = 10
    sums, moves = LayerSums(), [(0, 0, 0), (0.3, 0, 0), (0.3, 0.4, 0), (0, 0, 0)]
    for count, move in enumerate(moves):
        sums.add((0, 1), count, wanted + torch.tensor([[*move, 0.0]]), wanted)
    found = sums.errors([(0, 1)])
    assert found.names == ["embedding", "layer 0", "layer 1", "layer 2"]
    assert found.relative_errors == pytest.approx((0, 0.03, 0.05, 0))
    assert found.increments == pytest.approx((0, 0.03, 0.04, 0.05))
    sums.add((0, 1), 0, wanted, wanted)  # the pass is repeated
    assert sums.errors([(0, 1)]).relative_errors == (0,)


@pytest.mark.parametrize(
    ("mine", "said"),
    [
        (torch.zeros(2, 5), r"tokens \[2, 5\], the baseline \[2, 4\]"),
        (torch.zeros(3, 4), r"tokens \[3, 4\], the baseline \[2, 4\]"),
        (torch.full((2, 4), math.nan), "block 3, step 1: NaN or infinity before the first layer"),
        (torch.full((2, 4), math.inf), "block 3, step 1: NaN or infinity before the first layer"),
        (torch.zeros(0, 4), "are of different models"),
    ],
)
def test_layers_of_another_model_or_of_nothing(mine, said):
    with pytest.raises(InputError, match=said):
        LayerSums().add((3, 1), 0, mine, torch.ones(2, 4))
