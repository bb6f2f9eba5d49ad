"""The rollout's own decisions: distances to the reference frame, and which rope the sink is read with."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch

from lowvram.denoise.rollout import Rollout, RolloutSettings, cond_rope_distance
from lowvram.loading.weights import build_dit, load_shared
from lowvram.offload.copy_engine import Engine
from lowvram.offload.layers import Layers
from lowvram.offload.placement import Placement
from lowvram.parallel.ulysses import Ulysses
from lowvram.schedule import Block, blocks_of
from lowvram_models.rope import condition_rope, reference_time
from lowvram_quantize.format import Artifact

CPU = torch.device("cpu")
STEPS, SEED = 3, 11
BLOCKS = list(blocks_of(3, 4))


def test_random_distance_is_seeded_and_in_range():
    drawn = [cond_rope_distance("random", 420, block, step) for block in range(50) for step in range(4)]
    assert drawn == [cond_rope_distance("random", 420, block, step) for block in range(50) for step in range(4)]
    assert set(drawn) == set(range(4, 31))
    assert cond_rope_distance(17, 420, 3, 2) == 17


@pytest.fixture(scope="module")
def rollout(tiny) -> Rollout:
    component = Artifact.open(tiny.artifact("fp32")).component("dit")
    dit, engine = build_dit(component), Engine(CPU)
    load_shared(dit, component, CPU, torch.float32)
    settings = RolloutSettings(
        frames_per_clip=4, latent_size=(8, 8), sample_steps=STEPS, base_seed=SEED, cond_rope_distance="random"
    )
    layers = Layers(dit, component, engine, torch.float32)
    context = torch.zeros(2, dit.config.text_dim)
    return Rollout(dit, layers, context, settings, dtype=torch.float32, engine=engine, placement=Placement())


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"clip{block.clip}.slot{block.slot}")
def test_each_step_of_each_block_reads_the_sink_at_its_own_distance(rollout, block: Block):
    """Drawn for the block's number in the video, not in its clip; and measured from where the video is by then."""
    config = rollout.dit.config
    audio = torch.zeros(1, config.audio_layers, config.audio_dim, 4 * block.frames)
    rollout.start(block, torch.zeros(16, block.frames, 8, 8), audio)
    flight = rollout._under_way[block.index]
    distances = [cond_rope_distance("random", SEED, block.index, step) for step in range(STEPS)]
    for step, distance in enumerate(distances):
        expected = condition_rope(
            *rollout.settings.grid, config.head_dim, reference_time=reference_time(block.first_frame, distance)
        )
        read = rollout._call(flight, step).sink_rope
        assert torch.equal(read.cos, expected.cos)
        assert torch.equal(read.sin, expected.sin)
    rollout.finish(block)


def test_distances_of_these_blocks_differ():
    """Else the test above could not tell steps, or blocks of two clips, from each other."""
    drawn = {b.index: [cond_rope_distance("random", SEED, b.index, step) for step in range(STEPS)] for b in BLOCKS}
    assert all(len(set(of_steps)) > 1 for of_steps in drawn.values())
    assert all(drawn[b.index] != drawn[b.slot] for b in BLOCKS if b.clip)


class Lanes:
    """Stands for graphs: notes which steps a lane was asked for, and has none."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def lane(self, step: int, *_: object) -> None:
        self.asked.append(step)


@pytest.mark.parametrize(
    ("steps", "asked"), [((1, 0), [1, 0]), ((2, 1), [2, 1]), ((1, 1), []), ((0, 0), []), ((2,), [2])]
)
def test_two_blocks_at_one_step_share_no_lane(rollout, monkeypatch, steps, asked):
    """A lane holds one block's tensors; in a wave no two blocks are at one step, and a caller of its own might be."""
    monkeypatch.setattr(rollout, "graphs", lanes := Lanes())
    blocks = [block for block in BLOCKS if block.clip == 2][: len(steps)]
    for block in blocks:
        audio = torch.zeros(1, rollout.dit.config.audio_layers, rollout.dit.config.audio_dim, 4 * block.frames)
        rollout.start(block, torch.zeros(16, block.frames, 8, 8), audio)
    flights = [rollout._under_way[block.index] for block in blocks]
    rollout._keep_in_lanes([rollout._call(flight, step) for flight, step in zip(flights, steps, strict=True)])
    for block in blocks:
        rollout.finish(block)
    assert lanes.asked == asked


@pytest.mark.parametrize("wanted", range(-1, STEPS + 1))
def test_latents_are_seen_before_each_step_and_behind_the_last(rollout, monkeypatch, wanted):
    """And what is given for one of them takes its place."""
    block, given = BLOCKS[0], torch.full((16, BLOCKS[0].frames, 8, 8), 0.5)
    seen: list[tuple[int, bool]] = []

    def on_latent(of: Block, step: int, latent: torch.Tensor) -> torch.Tensor:
        assert of is block
        seen.append((step, torch.equal(latent, noise)))
        return given if step == wanted else latent

    monkeypatch.setattr(rollout, "on_latent", on_latent)
    noise = torch.zeros(16, block.frames, 8, 8)
    audio = torch.zeros(1, rollout.dit.config.audio_layers, rollout.dit.config.audio_dim, 4 * block.frames)
    rollout.prefill(torch.zeros(16, 1, 8, 8), torch.zeros(16, 19, 8, 8))
    found = rollout.denoise(block, noise, audio)
    assert seen == [(step, step == 0) for step in range(STEPS + 1)]
    assert torch.equal(found, given) == (wanted == STEPS)


class Exchanges:
    """A group of one rank: notes what it would send and receive, and fails behind so many exchanges."""

    def __init__(self) -> None:
        self.made: list[tuple[list[int], list[int]]] = []
        self.left = sys.maxsize

    def begin(self, flat: torch.Tensor, sent: list[int], received: list[int]) -> Arrived:
        if len(self.made) == self.left:
            raise MemoryError
        self.made.append((sent, received))
        return Arrived(flat)


@dataclasses.dataclass
class Arrived:
    value: torch.Tensor

    def wait(self) -> torch.Tensor:
        return self.value


@pytest.mark.parametrize("blocks", [0, 1, 2, 3], ids=["prefill", "a block", "a wave of 2", "a wave of 3"])
@pytest.mark.parametrize("done", [0, 1, 6, -1])
def test_who_fails_exchanges_the_rest_with_nothing(rollout, monkeypatch, blocks, done):
    """Of the filling of the sink, and of a pass: as often, and as much, as those who did not fail."""
    exchanges = Exchanges()
    monkeypatch.setattr(rollout, "sequence", Ulysses(0, 1, exchanges))
    conditions = torch.zeros(16, 1, 8, 8), torch.zeros(16, 19, 8, 8)
    under_way = BLOCKS[:blocks]
    audio = torch.zeros(1, rollout.dit.config.audio_layers, rollout.dit.config.audio_dim, 12)
    for block in under_way:
        rollout.start(block, torch.zeros(16, block.frames, 8, 8), audio[..., : 4 * block.frames])

    def work() -> None:
        rollout.sequence.begins()
        exchanges.made.clear()
        if blocks:
            rollout.advance(list(zip(under_way, reversed(range(blocks)), strict=True)))
        else:
            rollout.prefill(*conditions)

    work()
    expected = list(exchanges.made)
    exchanges.left = done % len(expected)
    with pytest.raises(MemoryError):
        work()
    exchanges.left = sys.maxsize
    if blocks:
        rollout.advance_with_nothing(under_way)
    else:
        rollout.prefill_with_nothing()
    for block in under_way:
        rollout.finish(block)
    assert exchanges.made == expected
