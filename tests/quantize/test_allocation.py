"""Allocation: the best choice within a budget, checked against all choices where they can be counted."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from lowvram_kernels.errors import ConfigError
from lowvram_quantize.allocation import MARGIN, Allocation, Budget, allocate, within_bytes, within_error
from lowvram_quantize.units import Choice
from tests.quantize.checkpoints import refusal

HEADER = 1000


def table_of(sizes: list[int], errors: list[tuple[float, float, float]]) -> dict[str, dict[str, Choice]]:
    """Units of so many weights, with their errors in int8, fp8 and bf16."""
    return {
        f"unit{index}": {
            "int8": Choice(size + 4, errors[index][0]),
            "fp8": Choice(size + 4, errors[index][1]),
            "bf16": Choice(2 * size, errors[index][2]),
        }
        for index, size in enumerate(sizes)
    }


def drawn(seed: int, count: int, most: int = 5000) -> dict[str, dict[str, Choice]]:
    draw = random.Random(seed)
    sizes = [draw.randint(10, most) for _ in range(count)]
    return table_of(sizes, [(draw.random(), draw.random() * 3, draw.random() * 1e-6) for _ in sizes])


def size_in(table, padding: int = 1):
    """Bytes of a file of such units behind a header, padded up to a multiple."""
    return lambda schemes: -(-(HEADER + sum(table[u][s].nbytes for u, s in schemes.items())) // padding) * padding


def every(table) -> list[tuple[int, float]]:
    """Bytes and squared errors of all choices."""
    size = size_in(table)
    found = []
    for schemes in itertools.product(("int8", "fp8", "bf16"), repeat=len(table)):
        chosen = dict(zip(table, schemes, strict=True))
        found.append((size(chosen), math.fsum(table[u][s].error for u, s in chosen.items())))
    return found


def between(table, share: float) -> int:
    lowest, highest = (size_in(table)(dict.fromkeys(table, scheme)) for scheme in ("int8", "bf16"))
    return round(lowest + share * (highest - lowest))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9, 1])
def test_no_choice_within_the_bytes_is_better(seed, share):
    table = drawn(seed, 7)
    target = between(table, share)
    found = within_bytes(table, size_in(table), target)
    met = [error for nbytes, error in every(table) if (1 - MARGIN) * target <= nbytes <= target]
    assert found.nbytes == size_in(table)(found.schemes) <= target
    if met:
        assert found.nbytes >= (1 - MARGIN) * target
        assert found.error**2 <= min(met) * 1.01 + 1e-9


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9, 1])
def test_no_choice_with_so_little_error_is_smaller(seed, share):
    table = drawn(seed, 7)
    choices = every(table)
    least, smallest = min(error for _, error in choices), min(choices)
    most = math.sqrt(least + share * (smallest[1] - least)) * (1 + 1e-12)
    found = within_error(table, size_in(table), most)
    assert found.error <= most
    assert found.nbytes <= min(nbytes for nbytes, error in choices if error <= most**2) * 1.001


@pytest.mark.parametrize("padding", [1, 64, 4096])
@pytest.mark.parametrize("count", [30, 60, 400])
def test_targets_are_met_within_1_percent_of_the_padded_file(count, padding):
    table = drawn(count, count, most=200_000)
    for share in (0.02, 0.2, 0.4, 0.6, 0.8, 0.97):
        target = between(table, share)
        found = within_bytes(table, size_in(table, padding), target)
        assert (1 - MARGIN) * target <= found.nbytes <= target


def test_more_bytes_are_never_worse():
    table = drawn(1, 50)
    errors = [within_bytes(table, size_in(table), between(table, share / 20)).error for share in range(21)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] <= math.sqrt(math.fsum(of["int8"].error for of in table.values()))


def test_fp8_is_taken_where_it_errs_less_for_the_same_bytes():
    table = table_of([100, 100, 100], [(0.5, 0.1, 0.0), (0.1, 0.5, 0.0), (0.3, 0.3, 0.0)])
    found = within_bytes(table, size_in(table), between(table, 0))
    assert list(found.schemes.values()) == ["fp8", "int8", "int8"]


def test_fp8_is_not_taken_for_the_few_bytes_that_int8_has_beside_its_weights():
    table = {"unit": {"int8": Choice(110, 0.1), "fp8": Choice(104, 0.2), "bf16": Choice(200, 0.0)}}
    assert within_error(table, size_in(table), 10.0).schemes == {"unit": "int8"}
    assert within_bytes(table, size_in(table), HEADER + 110).schemes == {"unit": "int8"}


def test_units_that_do_not_add_up_to_the_target(caplog):
    """Two large ones: what is nearest below is taken, and said."""
    table = table_of([10_000, 10_000], [(0.1, 1, 0), (0.2, 1, 0)])
    target = between(table, 0.8)
    found = within_bytes(table, size_in(table), target)
    assert found.schemes == {"unit0": "int8", "unit1": "bf16"}
    assert f"--target-bytes is {target}; the nearest below it that this DiT's layers add up to is {found.nbytes}" in (
        caplog.text
    )


@pytest.mark.parametrize("off", [-1, 1])
def test_bytes_that_no_choice_takes(off):
    table = drawn(3, 5)
    lowest, highest = between(table, 0), between(table, 1)
    target = lowest - 1 if off < 0 else highest + 1
    with refusal(
        ConfigError, f"--target-bytes is {target}", f"{lowest} bytes where all", f"{highest} where all are bf16"
    ):
        allocate(table, size_in(table), Budget(target_bytes=target))


def test_an_error_that_no_choice_has():
    table = drawn(3, 5)
    with refusal(ConfigError, "--max-error is 1e-09, but the least that is predicted is", "bytes"):
        allocate(table, size_in(table), Budget(max_error=1e-9))


def test_an_error_that_every_choice_has_takes_the_fewest_bytes():
    table = drawn(3, 5)
    found = allocate(table, size_in(table), Budget(max_error=100.0))
    assert isinstance(found, Allocation)
    assert found.nbytes == between(table, 0)


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({}, "expected one of both"),
        ({"target_bytes": 10, "max_error": 0.1}, "expected one of both"),
        ({"target_bytes": 0}, "--target-bytes is 0"),
        ({"max_error": 0.0}, "--max-error is 0.0"),
        ({"max_error": -0.1}, "--max-error is -0.1"),
        ({"max_error": math.nan}, "--max-error is nan"),
        ({"max_error": math.inf}, "--max-error is inf"),
    ],
)
def test_budgets_that_say_nothing(given, part):
    with refusal(ConfigError, part):
        Budget(**given)
