"""Whatever lets one stream wait for another is needed: without it, a check fails."""

from __future__ import annotations

import dataclasses
import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lowvram.denoise.cuda_graphs import LayerGraphs
from lowvram.offload.copy_engine import CudaEngine, Engine
from lowvram.offload.placement import Placement
from lowvram.offload.prefetch import Prefetcher
from lowvram_models.dit import LayerInputs
from lowvram_models.rope import Rope
from tests.lowvram.streams.checks import assert_ordered, faults
from tests.lowvram.streams.miniature import CELLS, Course, Miniature
from tests.lowvram.streams.mutations import EXCEPTIONS, MUTATIONS, Mutation, sites

Tensor = torch.Tensor
ALL_LAYERS = (0, 1, 2, 3)


def course(course: Course, engine: Engine) -> Tensor:
    return Miniature(engine, course).run()


def a_slot_goes_while_it_is_copied_out_of(engine: Engine) -> Tensor:
    host = engine.host_buffer(64)
    prefetcher = Prefetcher(engine, [torch.zeros(64, dtype=torch.uint8)])
    prefetcher.load(iter([("a", lambda slot, after: after)]))
    slot = prefetcher.take("a")
    slot.fill_(3)
    prefetcher.release("a", engine.copy_out(host, slot, engine.now()))
    del slot, prefetcher
    engine.settle()
    return host.clone()


def graphs_are_dropped(engine: Engine) -> Tensor:
    """Graphs may be let go only when the host knows that the device is done with them."""
    unfinished: list[int] = []

    def capture(work: Callable[[], object]) -> Callable[[], None]:
        def replay() -> None:
            work()
            unfinished[:] = [1]

        def gone() -> None:
            if unfinished:
                raise AssertionError

        if isinstance(engine, CudaEngine):
            weakref.finalize(replay, lambda: seen.append(len(unfinished))).atexit = False
        return replay

    seen: list[int] = []
    settle = engine.settle

    def settled() -> None:
        settle()
        unfinished.clear()

    engine.settle = settled  # type: ignore[method-assign]
    graphs = LayerGraphs(lambda: capture, engine, print)
    x, rope = torch.ones(3, 4), Rope(torch.ones(3, 2), torch.ones(3, 2))
    inputs: Any = LayerInputs(time=None, text=None, rope=rope, frames=1)  # type: ignore[arg-type]
    lane = graphs.lane(0, x, inputs, rope)
    assert lane is not None
    for _ in range(3):
        graphs.through(lane, (0, 0), lane.x_LD, lambda x: x * 2)
    graphs.drop()
    gc.collect()
    engine.settle = settle  # type: ignore[method-assign]
    assert not any(seen), "a graph went while the device ran it"
    return lane.x_LD.clone()


AWAY = Placement(streamed_layers=ALL_LAYERS, host_rings=CELLS)
MOVING = Course(
    start=Placement(wave=2, streamed_layers=(1,), host_rings=CELLS[2:3], ring_slots=3),
    moves={3: Placement(streamed_layers=(0, 2), host_rings=CELLS[::2]), -8: dataclasses.replace(AWAY, weight_slots=1)},
    fails=frozenset({1, 3}),
)
WORKS = {
    "moving": functools.partial(course, MOVING),
    "staying away": functools.partial(course, Course(start=AWAY)),
    "staying here": functools.partial(course, Course(start=Placement(), fails=frozenset({1}), ends=2)),
    "left amid copies": functools.partial(course, Course(start=AWAY, ends=1, decodes=False)),
    "a slot": a_slot_goes_while_it_is_copied_out_of,
    "graphs": graphs_are_dropped,
}


@pytest.fixture(scope="module")
def plain() -> dict[str, Tensor]:
    return {name: work(Engine(torch.device("cpu"))) for name, work in WORKS.items()}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_each_wait_is_needed(monkeypatch, plain, mutation: Mutation):
    with mutation.made():
        assert any(faults(monkeypatch, work, plain[name]) for name, work in WORKS.items()), mutation.breaks


@pytest.mark.parametrize("name", [name for name in WORKS if name != "graphs"])
def test_with_all_of_them_nothing_is_wrong(monkeypatch, name):
    assert_ordered(monkeypatch, WORKS[name])


def test_none_is_forgotten():
    """Every call that orders something is in the list, or said to order nothing."""
    listed = {(mutation.file, line) for mutation in MUTATIONS for line in mutation.lines()}
    forgotten = [
        site
        for site in sites()
        if (site.file, site.line) not in listed
        and not any(
            (site.file, site.function) == (file, function) and site.text.startswith(text)
            for file, function, text in EXCEPTIONS
        )
    ]
    assert not forgotten, "\n".join(f"{s.file}:{s.line} {s.function}: {s.text}" for s in forgotten)
    assert len(sites()) > 30
