"""Memory that runs out on a rank of several that share tokens and heads: all ranks do the work again, and the video is
the same."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Iterator

import pytest
import torch

from tests.golden_cases import relative_error
from tests.lowvram.parallel.conftest import Made, Maker, layout_options
from tests.lowvram.parallel.test_equal import FP32

SAYS = "CUDA out of memory. Tried to allocate 2.00 GiB."
# Calls of each rank: four layers fill the sink; in a pass all blocks go through each of four, then through the head.
FILL, LAYERS = 4, 4


@contextlib.contextmanager
def running_out(where: dict[int, list[tuple[str, int]]]) -> Iterator[None]:
    """On the ranks given, in calls of these functions, counted from 0."""
    from lowvram.denoise.rollout import Rollout
    from lowvram.parallel.ulysses import Ulysses
    from lowvram_models.dit import CausalDiT, Head

    owners = {"layer": CausalDiT, "forward": Head, "to_tokens": Ulysses, "start": Rollout, "prefill": Rollout}
    mine = where.get(int(os.environ["RANK"]), [])
    with pytest.MonkeyPatch.context() as patch:
        for name in {name for name, _ in mine}:
            owner = owners[name]
            calls = {call for each, call in mine if each == name}
            patch.setattr(owner, name, failing(getattr(owner, name), calls))
        yield


def failing(real, calls: set[int]):
    count = itertools.count()

    def wrapped(*args, **kwargs):
        if next(count) in calls:
            raise torch.cuda.OutOfMemoryError(SAYS)
        return real(*args, **kwargs)

    return wrapped


@pytest.fixture(scope="module")
def alone(maker: Maker, tmp_path_factory) -> dict[str, Made]:
    folder = tmp_path_factory.mktemp("alone")
    return {kv: maker.make(folder, 0, f"--kv={kv}") for kv in ("auto", "int8")}


CASES = {
    "in the middle of a pass": (1, 2, False, {1: [("layer", FILL + LAYERS + 2)]}, ["--kv=int8"]),
    "between two exchanges": (1, 3, False, {2: [("to_tokens", FILL + LAYERS + 1)]}, []),
    "behind the last exchange of the layers": (1, 2, True, {0: [("forward", 3)]}, []),
    "while the sink is filled, twice": (1, 2, False, {1: [("layer", 0), ("layer", 2)]}, ["--offload-kv-cache"]),
    "before a block begins": (2, 2, False, {0: [("start", 1)], 3: [("start", 2)]}, []),
    "on two ranks at once, at different layers": (
        1, 3, True, {0: [("layer", FILL + 1)], 1: [("layer", FILL + 3)]}, ["--wave=2", "--kv=int8"],
    ),
    "in a wave, and in what is done again": (
        2, 2, True, {1: [("layer", FILL + 9), ("layer", FILL + 10)]}, ["--wave=2"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_ranks_step_down_together(maker, alone, tmp_path, name):
    stages, ulysses, vae, where, options = CASES[name]
    around = {"around": functools.partial(running_out, where)}
    made = maker.make(tmp_path, stages * ulysses + vae, *layout_options(stages, ulysses, vae), *options, options=around)
    given_up = {rank["rank"]: rank["memory"]["given_up"] for rank in made.report["ranks"]}
    assert {rank: len(events) for rank, events in given_up.items() if events} == {
        rank: len(calls) for rank, calls in where.items()
    }
    one = alone["int8" if "--kv=int8" in options else "auto"]
    errors = [relative_error(mine, its) for mine, its in zip(made.latents, one.latents, strict=True)]
    assert max(errors) <= FP32, errors


def test_no_fallback_ends_all_ranks(maker, ranks, tmp_path):
    arguments = maker.arguments(tmp_path / "out.mp4", "--ulysses_size=2", "--no-fallback")
    around = functools.partial(running_out, {1: [("layer", FILL + 2)]})
    first, last = ranks.run(2, arguments, around=around)
    assert (first.code, last.code) == (1, 1)
    assert f"denoise: {SAYS.rstrip('.')}; --no-fallback forbids" in " ".join(last.stderr.split())
    assert "rank 1 (stage 0, part 1) on" in first.stderr


def test_a_rank_with_nothing_left_ends_all(maker, ranks, tmp_path):
    arguments = maker.arguments(tmp_path / "out.mp4", "--ulysses_size=2")
    around = functools.partial(running_out, {0: [("layer", call) for call in range(FILL + 2, 500)]})
    first, last = ranks.run(2, arguments, around=around)
    assert (first.code, last.code) == (1, 1)
    assert "nothing is left that could leave the device" in " ".join(first.stderr.split())
    assert "rank 0 (stage 0, part 0) on" in last.stderr
